package volume

import (
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// Revert brings back content and what is known of the filesystem; later
// snapshots and the size stay.
func TestRevert(t *testing.T) {
	const n = 1 << 20
	p := newPool(t)
	a := create(t, p, "a", Source{})
	empty := snapshot(t, p, "empty", a.ID)
	formatted := Filesystem{FilesystemFormatted, "ext4"}
	if err := p.SetFilesystem(a.ID, formatted); err != nil {
		t.Fatal(err)
	}
	write(t, p, a.ID, 0, 1, n)
	first := snapshot(t, p, "first", a.ID)
	write(t, p, a.ID, 0, 2, n)
	if _, err := p.Expand(t.Context(), a.ID, SizeRange{Required: 16 * n}); err != nil {
		t.Fatal(err)
	}
	write(t, p, a.ID, 12*n, 3, n)
	later := snapshot(t, p, "later", a.ID)

	for _, c := range []struct {
		to       Snapshot
		fs       Filesystem
		low, end byte
	}{
		{first, formatted, 1, 0}, {later, formatted, 2, 3}, {empty, Filesystem{}, 0, 0}, {later, formatted, 2, 3},
	} {
		v, err := p.Revert(t.Context(), a.ID, c.to.ID)
		if err != nil {
			t.Fatalf("revert to %q: %v", c.to.Name, err)
		}
		if v.Size != 16*n || v.Filesystem != c.fs {
			t.Errorf("reverted to %q: got %d bytes, %+v, want %d, %+v", c.to.Name, v.Size, v.Filesystem, 16*n, c.fs)
		}
		wantBytes(t, p, a.ID, 0, c.low, n)
		wantBytes(t, p, a.ID, 12*n, c.end, n)
	}
	if all, _, err := p.ListSnapshots(SnapshotFilter{Volume: a.ID}, "", 0); err != nil || len(all) != 3 {
		t.Errorf("snapshots: got %+v, %v", all, err)
	}
}

func TestRevertRefusals(t *testing.T) {
	p := newPool(t)
	a, b := create(t, p, "a", Source{}), create(t, p, "b", Source{})
	s := snapshot(t, p, "s", a.ID)
	d := open(t, p, a.ID)
	for _, c := range []struct {
		volume, snapshot string
		want             error
	}{
		{a.ID, s.ID, ErrInUse}, {b.ID, s.ID, ErrInvalid}, {a.ID, "snap", ErrNotFound}, {"vol", s.ID, ErrNotFound},
	} {
		if _, err := p.Revert(t.Context(), c.volume, c.snapshot); !errors.Is(err, c.want) {
			t.Errorf("revert %q to %q: got %v, want %v", c.volume, c.snapshot, err, c.want)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	_, done, err := p.keepClosed(a.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Open(t.Context(), a.ID); !errors.Is(err, ErrBusy) {
		t.Errorf("open a volume that is being reverted: got %v, want ErrBusy", err)
	}
	done()
}

// A copy that is reverted to a time when it needed its source needs it again.
func TestRevertCopy(t *testing.T) {
	const n = 1 << 20
	p := newPool(t)
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	c := clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	s := snapshot(t, p, "s", c.ID)
	copyAll(t, p)
	if _, err := p.Revert(t.Context(), c.ID, s.ID); err != nil {
		t.Fatal(err)
	}
	remove(t, p, a.ID)
	reap(t, p)
	wantBytes(t, p, c.ID, 0, 1, n)
	remove(t, p, s.ID)
	reap(t, p)
	copyAll(t, p)
	reap(t, p)
	wantIndependent(t, p, c.ID, true)
	wantBytes(t, p, c.ID, 0, 1, n)
}

// A fullFile does not grow once it is told so.
type fullFile struct {
	qcow2.File
	full *atomic.Bool
}

func (f fullFile) grow(end int64) error {
	size, err := f.Size()
	if err == nil && f.full.Load() && end > size {
		err = syscall.ENOSPC
	}
	return err
}

func (f fullFile) Truncate(size int64) error {
	if err := f.grow(size); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f fullFile) Allocate(off, n int64) error {
	if err := f.grow(off + n); err != nil {
		return err
	}
	return f.File.Allocate(off, n)
}

// A revert that was refused for lack of space does not happen later: the volume
// can be used as it is, now and when there is space.
func TestRevertWithoutSpace(t *testing.T) {
	const n = 1 << 20
	var full atomic.Bool
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{wrapFile: func(f qcow2.File) qcow2.File { return fullFile{f, &full} }})
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	s := snapshot(t, p, "s", a.ID)
	write(t, p, a.ID, 0, 2, n)
	full.Store(true)
	if _, err := p.Revert(t.Context(), a.ID, s.ID); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("got %v, want ErrNoSpace", err)
	}
	wantBytes(t, p, a.ID, 0, 2, n)
	full.Store(false)
	wantBytes(t, p, a.ID, 0, 2, n)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = newPoolIn(t, dir)
	wantBytes(t, p, a.ID, 0, 2, n)
	if _, err := p.Revert(t.Context(), a.ID, s.ID); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, p, a.ID, 0, 1, n)
}

// A revert that the process did not live to begin, and that cannot be done now, keeps
// nobody from the volume as it is.
func TestRevertThatCannotBeFinished(t *testing.T) {
	const n = 1 << 20
	var full atomic.Bool
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{})
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	s := snapshot(t, p, "s", a.ID)
	write(t, p, a.ID, 0, 2, n)
	from, err := p.activeTable(a.ID)
	if err != nil {
		t.Fatal(err)
	}
	err = p.updateRecord(p.find(a.ID), func(r *volumeRecord) { r.Revert, r.RevertFrom = s.ID, from })
	if err := errors.Join(err, p.Close()); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{wrapFile: func(f qcow2.File) qcow2.File { return fullFile{f, &full} }})
	full.Store(true)
	if _, err := p.Open(t.Context(), a.ID); !errors.Is(err, ErrNoSpace) {
		t.Errorf("open: got %v, want ErrNoSpace", err)
	}
	wantBytes(t, p, a.ID, 0, 2, n)
	full.Store(false)
	wantBytes(t, p, a.ID, 0, 2, n)
	if _, err := p.Revert(t.Context(), a.ID, s.ID); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, p, a.ID, 0, 1, n)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}
