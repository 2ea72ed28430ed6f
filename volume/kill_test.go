package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// errKilled is what a killed process's calls return: it never gets to look.
var errKilled = errors.New("killed")

// A killer stops a process at its n-th change of the pool: after that nothing
// it does reaches the directory or an image.
type killer struct {
	mu    sync.Mutex
	at    int // guarded by mu
	seen  int // guarded by mu
	where string
}

func (k *killer) step(what string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.seen++
	if k.seen <= k.at {
		return nil
	}
	if k.where == "" {
		k.where = what
	}
	return errKilled
}

func (k *killer) options() Options {
	return Options{step: k.step, wrapFile: func(f qcow2.File) qcow2.File { return &mortalFile{f, k} }}
}

// A mortalFile is an image file of a process that can be killed.
type mortalFile struct {
	qcow2.File
	k *killer
}

func (f *mortalFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.k.step(fmt.Sprintf("write %d bytes at %#x", len(p), off)); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *mortalFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	if err := f.k.step(fmt.Sprintf("write vector at %#x", off)); err != nil {
		return 0, err
	}
	return f.File.WritevAt(bufs, off)
}

func (f *mortalFile) Datasync() error {
	if err := f.k.step("datasync"); err != nil {
		return err
	}
	return f.File.Datasync()
}

func (f *mortalFile) Truncate(size int64) error {
	if err := f.k.step("truncate"); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *mortalFile) Punch(off, n int64) error {
	if err := f.k.step("punch"); err != nil {
		return err
	}
	return f.File.Punch(off, n)
}

func (f *mortalFile) Allocate(off, n int64) error {
	if err := f.k.step("allocate"); err != nil {
		return err
	}
	return f.File.Allocate(off, n)
}

// An outcome is what users, the directory and the images show of a pool, without times.
type outcome struct {
	volumes   []Volume
	snapshots []Snapshot
	files     []string
	internal  []string // internal snapshots, tombstones' included
}

func outcomeOf(t *testing.T, p *Pool) outcome {
	t.Helper()
	volumes, _, err := p.List("", 0)
	if err != nil {
		t.Fatal(err)
	}
	snapshots, _, err := p.ListSnapshots(SnapshotFilter{}, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range volumes {
		volumes[i].Created = time.Time{}
		volumes[i].Copy.Copied = 0 // what a kill undid was copied twice
	}
	for i := range snapshots {
		snapshots[i].Created = time.Time{}
	}
	var internal []string
	for _, id := range p.sortedIDs() {
		d, err := p.openAny(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range d.Image.Snapshots() {
			internal = append(internal, id+" "+s.Name)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	slices.Sort(internal)
	return outcome{volumes, snapshots, files(t, p.Path()), internal}
}

func (o outcome) equal(p outcome) bool {
	return slices.Equal(o.volumes, p.volumes) && slices.Equal(o.snapshots, p.snapshots) && slices.Equal(o.files, p.files) &&
		slices.Equal(o.internal, p.internal)
}

// judgeEvery is how many kills there are for one that QEMU judges, too: its
// processes would take most of the time.
const judgeEvery = 8

// killStep is the distance from one kill to the next. What a kill leaves does
// not depend on the race detector, which makes each take six times as long: with
// it only some are tried. The crash part of make test tries all without.
func killStep() int {
	if raceEnabled {
		return 7
	}
	return 1
}

// TestKilledAtEveryStep runs each operation in a process that is killed at its
// first, second, … change of the pool, then again in a new process. The result
// is that of a run without a kill, and nothing is left over.
func TestKilledAtEveryStep(t *testing.T) {
	for _, op := range []struct {
		name string
		run  func(ctx context.Context, p *Pool, f family) error
		// repeat says which error of the second run means that the first was done.
		repeat error
		// content, if not 0, is what the first MiB of the volume "new" holds.
		content byte
		// changed is what the first MiB of volumes of the family holds then.
		changed map[string]byte
		// on, if not "", is the filesystem that the pool has to be on.
		on string
	}{
		{name: "create", run: func(ctx context.Context, p *Pool, _ family) error {
			_, err := p.Create(ctx, CreateRequest{Name: "new", Size: SizeRange{Required: 4 << 20}, Params: DefaultParams()})
			return err
		}},
		{name: "restore", run: func(ctx context.Context, p *Pool, f family) error {
			_, err := p.Create(ctx, CreateRequest{Name: "new", Params: DefaultParams(), Source: Source{Snapshot: f.ids["s1"]}})
			return err
		}, content: 1},
		{name: "clone", run: func(ctx context.Context, p *Pool, f family) error {
			_, err := p.Create(ctx, CreateRequest{Name: "new", Params: DefaultParams(), Source: Source{Volume: f.ids["cloned"]}})
			return err
		}, content: 3},
		{name: "copy", run: func(ctx context.Context, p *Pool, f family) error {
			q := DefaultParams()
			q.CloneMode = CloneCopy
			if _, err := p.Create(ctx, CreateRequest{Name: "new", Params: q, Source: Source{Volume: f.ids["cloned"]}}); err != nil {
				return err
			}
			_, err := p.CopyAll(ctx)
			return err
		}, content: 3},
		{name: "reflink", on: "xfs", run: func(ctx context.Context, p *Pool, f family) error {
			q := DefaultParams()
			q.CloneMode = CloneReflink
			_, err := p.Create(ctx, CreateRequest{Name: "new", Params: q, Source: Source{Volume: f.ids["cloned"]}})
			return err
		}, content: 3},
		{name: "group", run: func(ctx context.Context, p *Pool, f family) error {
			_, err := p.CreateGroup(ctx, "new", []string{f.ids["cloned"], f.ids["a"], f.ids["grandchild"]}, nil)
			return err
		}},
		{name: "delete group", run: func(ctx context.Context, p *Pool, f family) error {
			if _, err := p.CreateGroup(ctx, "new", []string{f.ids["a"], f.ids["restored"]}, nil); err != nil {
				return err
			}
			id, _ := p.GroupNamed("new")
			return p.DeleteGroup(ctx, id)
		}},
		{name: "revert", run: func(ctx context.Context, p *Pool, f family) error {
			_, err := p.Revert(ctx, f.ids["a"], f.ids["s1"])
			return err
		}, changed: map[string]byte{"a": 1}},
		{name: "snapshot", run: func(ctx context.Context, p *Pool, f family) error {
			_, err := p.CreateSnapshot(ctx, "new", f.ids["a"])
			return err
		}},
		{name: "expand", run: func(ctx context.Context, p *Pool, f family) error {
			_, err := p.Expand(ctx, f.ids["restored"], SizeRange{Required: 64 << 20})
			return err
		}},
		{name: "delete volume with snapshots", run: func(ctx context.Context, p *Pool, f family) error { return p.Delete(ctx, f.ids["a"]) }, repeat: ErrNotFound},
		{name: "delete clone", run: func(ctx context.Context, p *Pool, f family) error { return p.Delete(ctx, f.ids["grandchild"]) }, repeat: ErrNotFound},
		{name: "delete snapshot with clone", run: func(ctx context.Context, p *Pool, f family) error { return p.DeleteSnapshot(ctx, f.ids["s2"]) }, repeat: ErrNotFound},
		{name: "delete clone and its snapshot, reap", run: func(ctx context.Context, p *Pool, f family) error {
			for _, err := range []error{p.Delete(ctx, f.ids["restored"]), p.DeleteSnapshot(ctx, f.ids["s1"])} {
				if err != nil && !errors.Is(err, ErrNotFound) {
					return err
				}
			}
			_, err := p.Reap(ctx)
			return err
		}},
		{name: "write", run: func(ctx context.Context, p *Pool, f family) error {
			d, err := p.Open(ctx, f.ids["grandchild"])
			if err != nil {
				return err
			}
			_, err = d.Image.WriteAt(make([]byte, 300000), 3<<20)
			return errors.Join(err, d.Close())
		}},
	} {
		t.Run(op.name, func(t *testing.T) {
			base := storagetest.MemoryDir(t)
			if op.on != "" {
				base = newFilesystem(t, op.on)
			}
			live, template := filepath.Join(base, "pool"), filepath.Join(base, "template")
			if err := os.Mkdir(live, 0o700); err != nil {
				t.Fatal(err)
			}
			p := openPool(t, live, Options{})
			f := newFamily(t, p, "")
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			copyTree(t, live, template)

			// without a kill
			p = openPool(t, live, Options{})
			if err := op.run(t.Context(), p, f); err != nil {
				t.Fatal(err)
			}
			reap(t, p)
			want := outcomeOf(t, p)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}

			kills := 0
			for ; ; kills += killStep() {
				copyTree(t, template, live)
				where := killedRun(t, live, kills, func(p *Pool) error { return op.run(t.Context(), p, f) })
				if where == "" {
					break
				}
				p := openPool(t, live, Options{})
				if err := op.run(t.Context(), p, f); err != nil && !(op.repeat != nil && errors.Is(err, op.repeat)) {
					t.Fatalf("kill %d: again: %v", kills, err)
				}
				reap(t, p)
				if got := outcomeOf(t, p); !got.equal(want) {
					t.Fatalf("kill %d:\n got %+v\nwant %+v", kills, got, want)
				}
				for name := range f.want { // content of what is left, and repairs on the way
					if _, err := p.Get(f.ids[name]); err == nil {
						want := f.want[name]
						if b, changed := op.changed[name]; changed {
							want = b
						}
						wantBytes(t, p, f.ids[name], 0, want, 1<<20)
					}
				}
				if op.content != 0 {
					id, _ := p.VolumeNamed("new")
					wantBytes(t, p, id, 0, op.content, 1<<20)
				}
				if err := p.Close(); err != nil {
					t.Fatalf("kill %d: close: %v", kills, err)
				}
				if kills%judgeEvery == 0 {
					checkImages(t, live)
				} else {
					checkImagesHere(t, live)
				}
				if t.Failed() {
					t.Fatalf("kill %d at %q", kills, where)
				}
			}
			t.Logf("up to %d kill points", kills)
			if kills < 2 {
				t.Fatalf("only %d kill points: the operation changed nothing", kills)
			}
		})
	}
}

// killedRun runs op in a process that dies at its n-th change, and says where
// that was, "" if it did not come to that.
func killedRun(t *testing.T, dir string, n int, op func(*Pool) error) string {
	t.Helper()
	k := &killer{at: n}
	p, err := Open(t.Context(), dir, k.options())
	if err != nil {
		if !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
		return k.where
	}
	err = op(p)
	k.mu.Lock()
	where := k.where
	k.at = 0 // whatever is left of the process changes nothing
	k.mu.Unlock()
	if err != nil && where == "" {
		t.Fatalf("kill %d: %v", n, err)
	}
	p.Close() // drops the locks, as the kernel does; what it says does not matter
	return where
}

// copyTree makes to an exact copy of from, holes and all.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
}
