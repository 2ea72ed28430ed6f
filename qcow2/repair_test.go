package qcow2_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// content returns what QEMU reads from the image at path, or false if it cannot.
func content(t testing.TB, path string) ([]byte, bool) {
	t.Helper()
	raw := path + ".content"
	defer os.Remove(raw)
	if exec.Command("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, raw).Run() != nil {
		return nil, false
	}
	b, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	return b, true
}

// overlapPokes let metadata be something else too. QEMU raises the refcount
// and calls the image consistent; here it stays corrupt.
var overlapPokes = map[string]bool{
	"L1 to the header": true, "L1 only COPIED": true, "L2 to the L1": true, "L2 to an L2": true, "snapshot L1 is the active one": true,
	"L2 to the refcount table": true, "L2 to the refcount block": true,
}

func TestRepairPoked(t *testing.T) {
	for _, im := range pokedImages() {
		t.Run(im.name, func(t *testing.T) {
			t.Parallel()
			dir := scratch(t)
			sound := filepath.Join(dir, "sound.qcow2")
			im.make(t, sound)
			for name, poke := range pokes() {
				t.Run(name, func(t *testing.T) {
					ours, theirs := filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
					copyFile(t, sound, ours)
					edit(t, ours, poke)
					copyFile(t, ours, theirs)
					repairAgrees(t, ours, theirs, overlapPokes[name])
				})
			}
		})
	}
}

func TestRepairMutated(t *testing.T) {
	rng := newRand(t)
	dir := scratch(t)
	sound, ours := filepath.Join(dir, "sound.qcow2"), filepath.Join(dir, "ours.qcow2")
	for _, im := range mutatedImages() {
		im.make(t, sound)
		for i := range 6 {
			copyFile(t, sound, ours)
			flipBits(t, ours, rng)
			repairHolds(t, ours) // QEMU's own repair can run for hours on these
			if t.Failed() {
				t.Fatalf("%s, mutation %d", im.name, i)
			}
		}
		os.Remove(sound)
	}
}

// repairAgrees repairs two copies of a broken image, one with QEMU.
func repairAgrees(t *testing.T, ours, theirs string, overlap bool) {
	t.Helper()
	clean := repairHolds(t, ours)
	qemuCheck(t, theirs, "-r", "all")
	want, _, ok := qemuCheck(t, theirs)
	if ok && want.Corruptions+want.Leaks+want.CheckErrors == 0 && !clean && !overlap {
		got, left, err := checkPath(t, ours, qcow2.CheckOptions{})
		t.Errorf("QEMU repairs it, we do not: %+v, %v\n%s", got, err, strings.Join(messages(left), "\n"))
	}
}

// repairHolds repairs the image at path and reports whether it is clean then.
// If so, QEMU agrees, the image reads as before, and a second repair finds
// nothing to do; if not, the repair has said so.
func repairHolds(t *testing.T, path string) (clean bool) {
	t.Helper()
	before, readable := content(t, path)
	first, found, err := checkPath(t, path, qcow2.CheckOptions{RepairAll: true})
	got, _, err2 := checkPath(t, path, qcow2.CheckOptions{})
	clean = err2 == nil && got.Clean()
	// The other way round is legal: what one pass leaves can be gone for the next.
	if success := err == nil && first.Clean(); success && !clean {
		t.Errorf("the repair ends with %+v, %v; the image is %+v, %v", first, err, got, err2)
	}
	if !clean {
		return false
	}
	if r, text, ok := qemuCheck(t, path); !ok || r.Corruptions+r.Leaks+r.CheckErrors > 0 {
		t.Errorf("qemu-img check after our repair: %+v\n%s\nour repair:\n%s", r, text, strings.Join(messages(found), "\n"))
	}
	if after, ok := content(t, path); readable && (!ok || !bytes.Equal(before, after)) {
		t.Errorf("the repair changes what the image reads as")
	}
	repaired, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if r, _, err := checkPath(t, path, qcow2.CheckOptions{RepairAll: true}); err != nil || !r.Clean() || r.CorruptionsFixed+r.LeaksFixed > 0 {
		t.Errorf("a second repair: %+v, %v", r, err)
	}
	if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, repaired) {
		t.Errorf("a second repair writes (%v)", err)
	}
	return true
}

// TestRepairLeaksOnly: as QEMU does it, and nothing when the refcounts cannot
// be relied on.
func TestRepairLeaksOnly(t *testing.T) {
	dir := scratch(t)
	sound := filepath.Join(dir, "sound.qcow2")
	for _, im := range pokedImages() {
		if im.name == "snapshots" {
			im.make(t, sound)
		}
	}
	for name, poke := range pokes() {
		t.Run(name, func(t *testing.T) {
			ours, theirs := filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
			copyFile(t, sound, ours)
			edit(t, ours, poke)
			copyFile(t, ours, theirs)
			_, found, err := checkPath(t, ours, qcow2.CheckOptions{RepairLeaks: true})
			_, text, _ := qemuCheck(t, theirs, "-r", "leaks")
			if rebuild := strings.Contains(text, "ERROR need to rebuild"); rebuild != (err != nil) {
				t.Errorf("got %v, qemu-img says\n%s", err, text)
			}
			if err != nil {
				before := filepath.Join(dir, "before.qcow2")
				copyFile(t, sound, before)
				edit(t, before, poke)
				a, errA := os.ReadFile(before)
				b, errB := os.ReadFile(ours)
				if errA != nil || errB != nil || !bytes.Equal(a, b) {
					t.Error("a refused repair has changed the image")
				}
				return
			}
			got, _, _ := qemuCheck(t, ours)
			want, _, _ := qemuCheck(t, theirs)
			if got != want {
				t.Errorf("qemu-img check after our repair %+v, after QEMU's %+v\n%s\nqemu-img:\n%s", got, want, strings.Join(messages(found), "\n"), text)
			}
		})
	}
}

// pokedDisk returns a small image of testdata, poked.
func pokedDisk(t testing.TB, poke func(e editor)) *storagetest.Disk {
	t.Helper()
	d, err := storagetest.LoadDisk("testdata/snapshot.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	poke(editor{t, d})
	d.ResetCounts()
	return d
}

// diskContent returns the guest's view of the image in d and of its snapshots.
func diskContent(t testing.TB, d *storagetest.Disk) []byte {
	t.Helper()
	im := openDisk(t, d.Clone(), qcow2.Options{ReadOnly: true})
	defer mustClose(t, im)
	b := readAll(t, im)
	for _, s := range im.Snapshots() {
		b = append(b, s.ID+s.Name...)
		old := openDisk(t, d.Clone(), qcow2.Options{ReadOnly: true, Snapshot: s.ID})
		b = append(b, readAll(t, old)...)
		mustClose(t, old)
	}
	return b
}

// TestRepairPowerLoss cuts the power at every step of a repair: the next
// repair ends where the first would have, and until then the dirty bit asks for it.
func TestRepairPowerLoss(t *testing.T) {
	repaired := 0
	for name, poke := range pokes() {
		d := pokedDisk(t, poke)
		log := d.Clone()
		rec := log.Record()
		if r, err := qcow2.CheckFile(t.Context(), log, qcow2.CheckOptions{RepairAll: true}); err != nil || !r.Clean() {
			continue
		}
		repaired++
		want := diskContent(t, log)
		for s := range rec.States(newRand(t), 1) {
			after := s.Disk()
			e := editor{t, after}
			r, err := qcow2.CheckFile(t.Context(), after, qcow2.CheckOptions{})
			if err != nil || e.read(72, 8)&1 == 0 && !r.Clean() && !after.Equal(d) {
				t.Errorf("%s, after event %d, %s: half repaired and no dirty bit: %+v, %v", name, s.At, s.What, r, err)
			}
			if r, err := qcow2.CheckFile(t.Context(), after, qcow2.CheckOptions{RepairAll: true}); err != nil || !r.Clean() {
				t.Errorf("%s, after event %d, %s: repair %+v, %v", name, s.At, s.What, r, err)
			} else if !bytes.Equal(diskContent(t, after), want) {
				t.Errorf("%s, after event %d, %s: the repaired image reads as something else", name, s.At, s.What)
			}
		}
	}
	if repaired < 25 {
		t.Errorf("only %d images were repaired", repaired)
	}
}

// TestRepairFaults fails each operation of a repair in turn: the error
// surfaces, and a later repair succeeds.
func TestRepairFaults(t *testing.T) {
	boom := errors.New("boom")
	for _, name := range []string{"refcount of data 0", "refcount block cleared", "refcount table cleared", "refcount block twice",
		"L2 COPIED wrong", "L2 zero unaligned", "L1 COPIED missing", "snapshot without disk size"} {
		poke := pokes()[name]
		for n := 1; ; n++ {
			d := pokedDisk(t, poke)
			f := &storagetest.Fault{Ops: storagetest.OpAny, N: n, Err: boom}
			d.Inject(f)
			r, err := qcow2.CheckFile(t.Context(), d, qcow2.CheckOptions{RepairAll: true})
			if d.Hits(f) == 0 {
				if err != nil || !r.Clean() || r.CorruptionsFixed == 0 || n < 8 {
					t.Errorf("%s: %d operations, then %+v, %v", name, n-1, r, err)
				}
				break
			}
			if !errors.Is(err, boom) {
				t.Errorf("%s: operation %d fails, repair returns %+v, %v", name, n, r, err)
			}
			d.Clear()
			if r, err := qcow2.CheckFile(t.Context(), d, qcow2.CheckOptions{RepairAll: true}); err != nil || !r.Clean() {
				t.Errorf("%s: repair after operation %d has failed: %+v, %v", name, n, r, err)
			}
		}
	}
}
