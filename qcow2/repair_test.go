package qcow2_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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

// repairAgrees repairs two copies of a broken image, one with QEMU.
func repairAgrees(t *testing.T, ours, theirs string, overlap bool) {
	before, readable := content(t, ours)
	first, found, err := checkPath(t, ours, qcow2.CheckOptions{RepairAll: true})
	got, left, err2 := checkPath(t, ours, qcow2.CheckOptions{})
	if err != nil && err2 == nil && got.Clean() {
		t.Errorf("repair fails with %v, but the image is clean", err)
	}
	qemuCheck(t, theirs, "-r", "all")
	want, _, ok := qemuCheck(t, theirs)
	qemuClean := ok && want.Corruptions+want.Leaks+want.CheckErrors == 0
	if qemuClean && (err2 != nil || !got.Clean()) && !overlap {
		t.Errorf("QEMU repairs it, we do not: %v %v %+v\nfound\n%s\nleft\n%s", err, err2, got, strings.Join(messages(found), "\n"), strings.Join(messages(left), "\n"))
	}
	if err != nil || err2 != nil || !got.Clean() {
		if first.Clean() && err == nil {
			t.Errorf("the repair reports success: %+v", first)
		}
		return
	}
	if first.Corruptions+first.Leaks+first.CheckErrors > 0 {
		t.Errorf("the repair reports failure, but the image is clean: %+v", first)
	}
	if r, text, ok := qemuCheck(t, ours); !ok || r.Corruptions+r.Leaks+r.CheckErrors > 0 {
		t.Errorf("qemu-img check after our repair: %+v\n%s\nour repair:\n%s", r, text, strings.Join(messages(found), "\n"))
	}
	if after, ok := content(t, ours); readable && (!ok || !bytes.Equal(before, after)) {
		t.Errorf("the repair changes what the image reads as")
	}
	repaired, err := os.ReadFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	if r, _, err := checkPath(t, ours, qcow2.CheckOptions{RepairAll: true}); err != nil || !r.Clean() || r.CorruptionsFixed+r.LeaksFixed > 0 {
		t.Errorf("a second repair: %+v, %v", r, err)
	}
	if again, err := os.ReadFile(ours); err != nil || !bytes.Equal(again, repaired) {
		t.Errorf("a second repair writes (%v)", err)
	}
}
