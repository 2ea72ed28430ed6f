package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"csi-qcow2/internal/durable"
	"csi-qcow2/internal/storagetest"
)

// wantMended checks that the last volume of the pool in dir is n bytes of 1, which its
// source had, and that nothing stays when it goes.
func wantMended(t *testing.T, dir, id string, n int) {
	t.Helper()
	p := newPoolIn(t, dir)
	wantBytes(t, p, id, 0, 1, n)
	remove(t, p, id)
	reap(t, p)
	if left := files(t, dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// A volume whose image cannot be read keeps nobody from using the others, and
// nothing goes that it may read: neither when its source is deleted, nor when its
// name's hidden snapshot is asked for again. Mended, it is what it was.
func TestUnreadImageKeepsWhatItMayRead(t *testing.T) {
	const n = 1 << 20
	for what, damage := range map[string]func(disk string) error{
		"no magic": func(disk string) error {
			f, err := os.OpenFile(disk, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt(make([]byte, 4), 0)
			return errors.Join(err, f.Close())
		},
		"cut off":     func(disk string) error { return os.Truncate(disk, 50) },
		"missing":     os.Remove,
		"a directory": func(disk string) error { return errors.Join(os.Remove(disk), os.Mkdir(disk, 0o700)) },
	} {
		t.Run(what, func(t *testing.T) {
			dir := storagetest.MemoryDir(t)
			p := openPool(t, dir, Options{})
			a := create(t, p, "a", Source{})
			write(t, p, a.ID, 0, 1, n)
			c := create(t, p, "c", Source{Volume: a.ID})
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			disk := filepath.Join(dir, volumesDir, c.ID, diskName)
			good, err := os.ReadFile(disk)
			if err := errors.Join(err, damage(disk)); err != nil {
				t.Fatal(err)
			}

			p = openPool(t, dir, Options{})
			problem, err := p.Health(c.ID)
			if err != nil || !errors.Is(problem, ErrDamaged) || !strings.Contains(problem.Error(), filepath.Dir(disk)) {
				t.Errorf("health: %v, %v, want what to do about %q", problem, err, filepath.Dir(disk))
			}
			if err := p.Delete(t.Context(), c.ID); !errors.Is(err, ErrDamaged) {
				t.Errorf("delete: %v, want ErrDamaged", err)
			}
			wantBytes(t, p, a.ID, 0, 1, n)
			other := create(t, p, "other", Source{Volume: a.ID})
			remove(t, p, other.ID, a.ID)
			reap(t, p)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}

			if err := errors.Join(os.RemoveAll(disk), os.WriteFile(disk, good, 0o600)); err != nil {
				t.Fatal(err)
			}
			wantMended(t, dir, c.ID, n)
		})
	}
}

// What is wrong with one file is no reason to refuse a pool; what may be wrong
// with all of it is.
func TestIsDamage(t *testing.T) {
	for err, want := range map[error]bool{
		ErrDamaged: true, durable.ErrDamaged: true, syscall.EIO: true, syscall.EUCLEAN: true, syscall.ENOENT: true,
		syscall.ESTALE: false, syscall.EACCES: false, syscall.EMFILE: false, syscall.ENOMEM: false,
	} {
		if got := isDamage(fmt.Errorf("read: %w", err)); got != want {
			t.Errorf("%v: got %v, want %v", err, got, want)
		}
	}
}

// A volume whose directories cannot be read keeps nobody from using the others.
// Mended, it is what it was.
func TestUnreadDirectoryHarmsNobodyElse(t *testing.T) {
	const n = 1 << 20
	for _, name := range []string{snapshotsDir, viewsDir, "."} {
		t.Run(name, func(t *testing.T) {
			dir := storagetest.MemoryDir(t)
			p := openPool(t, dir, Options{})
			a := create(t, p, "a", Source{})
			write(t, p, a.ID, 0, 1, n)
			s := snapshot(t, p, "s", a.ID)
			c := create(t, p, "c", Source{Snapshot: s.ID})
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			lost := filepath.Join(dir, volumesDir, c.ID, name)
			away := filepath.Join(storagetest.MemoryDir(t), "away")
			if err := errors.Join(os.Rename(lost, away), os.WriteFile(lost, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			p = openPool(t, dir, Options{})
			if problem, err := p.Health(c.ID); err != nil || !errors.Is(problem, ErrDamaged) {
				t.Errorf("health: %v, %v, want ErrDamaged", problem, err)
			}
			wantBytes(t, p, a.ID, 0, 1, n)
			remove(t, p, s.ID, a.ID)
			reap(t, p)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(os.Remove(lost), os.Rename(away, lost)); err != nil {
				t.Fatal(err)
			}
			wantMended(t, dir, c.ID, n)
		})
	}
}

// What an overlay reads is not replaced by what is made under the same name when
// the record of it is lost.
func TestLostNameIsNotUsedAgain(t *testing.T) {
	const n = 1 << 20
	for _, what := range []string{"snapshot", "volume"} {
		t.Run(what, func(t *testing.T) {
			dir := storagetest.MemoryDir(t)
			p := openPool(t, dir, Options{})
			a := create(t, p, "a", Source{})
			write(t, p, a.ID, 0, 1, n)
			s := snapshot(t, p, "s", a.ID)
			c := create(t, p, "c", Source{Snapshot: s.ID})
			write(t, p, a.ID, 0, 2, n)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			lost := filepath.Join(dir, snapshotRecName(a.ID, s.ID))
			if what == "volume" {
				lost = filepath.Join(dir, volumeDir(a.ID))
			}
			away := filepath.Join(storagetest.MemoryDir(t), "away")
			if err := os.Rename(lost, away); err != nil {
				t.Fatal(err)
			}
			p = openPool(t, dir, Options{})
			again := a
			if what == "volume" {
				again = create(t, p, "a", Source{})
				write(t, p, again.ID, 0, 2, n)
			}
			s2 := snapshot(t, p, "s", again.ID)
			other := create(t, p, "other", Source{Snapshot: s2.ID})
			wantBytes(t, p, other.ID, 0, 2, n)
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(away, lost); err != nil {
				t.Fatal(err)
			}
			p = newPoolIn(t, dir)
			wantBytes(t, p, c.ID, 0, 1, n)
			wantBytes(t, p, other.ID, 0, 2, n)
		})
	}
}
