package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

func TestCreateIsIdempotent(t *testing.T) {
	p := newPool(t)
	a := create(t, p, "pvc-1", Source{})
	b := create(t, p, "pvc-1", Source{})
	if a != b {
		t.Fatalf("second create: got %+v, want %+v", b, a)
	}
	if got, err := PoolOf(a.ID); err != nil || got != p.ID() {
		t.Fatalf("PoolOf(%q) = %q, %v", a.ID, got, err)
	}
	other := DefaultParams()
	other.ClusterSize = 4096
	for _, req := range []CreateRequest{
		{Name: "pvc-1", Size: SizeRange{Required: 16 << 20}, Params: DefaultParams()},
		{Name: "pvc-1", Size: SizeRange{Limit: 4 << 20}, Params: DefaultParams()},
		{Name: "pvc-1", Size: SizeRange{Required: 8 << 20}, Params: other},
		{Name: "pvc-1", Size: SizeRange{Required: 8 << 20}, Params: DefaultParams(), Source: Source{Volume: a.ID}},
	} {
		if _, err := p.Create(t.Context(), req); !errors.Is(err, ErrIncompatible) {
			t.Errorf("create %+v: got %v, want ErrIncompatible", req, err)
		}
	}
}

func TestCreateSizes(t *testing.T) {
	p := newPool(t)
	for i, c := range []struct {
		size SizeRange
		want int64
		err  error
	}{
		{SizeRange{}, DefaultSize, nil},
		{SizeRange{Limit: 5 << 20}, 5 << 20, nil},
		{SizeRange{Required: 1}, MinSize, nil},
		{SizeRange{Required: 1<<20 + 1}, 1<<20 + 4096, nil},
		{SizeRange{Required: 1<<20 + 1, Limit: 1<<20 + 512}, 0, ErrOutOfRange},
		{SizeRange{Limit: 1000}, 0, ErrOutOfRange},
		{SizeRange{Required: -1}, 0, ErrInvalid},
		{SizeRange{Limit: -1}, 0, ErrInvalid},
		{SizeRange{Required: 2 << 20, Limit: 1 << 20}, 0, ErrInvalid},
		{SizeRange{Required: MaxSize + 1}, 0, ErrOutOfRange},
		{SizeRange{Required: 1<<63 - 1}, 0, ErrOutOfRange},
		{SizeRange{Required: MaxSize}, MaxSize, nil},
	} {
		v, err := p.Create(t.Context(), CreateRequest{Name: strings.Repeat("n", i+1), Size: c.size, Params: DefaultParams()})
		if !errors.Is(err, c.err) || v.Size != c.want {
			t.Errorf("size %+v: got %d, %v, want %d, %v", c.size, v.Size, err, c.want, c.err)
		}
		if err == nil {
			if info := qemutest.GetInfo(t, filepath.Join(p.Path(), volumeDir(v.ID), diskName)); info.VirtualSize != c.want {
				t.Errorf("size %+v: qemu-img says %d", c.size, info.VirtualSize)
			}
		}
	}
}

func TestParams(t *testing.T) {
	for name, value := range map[string]string{
		"clusterSize": "0", "lazyRefcounts": "maybe", "extendedL2": "true", "discard": "TRUE ", "preallocation": "some",
		"directIO": "1", "cloneMode": "Copy", "backingImage": "x", "ClusterSize": "65536", "": "", "pool ": "x",
	} {
		if _, err := ParseParams(map[string]string{name: value}); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%q=%q: got %v, want ErrInvalid that names it", name, value, err)
		}
	}
	for _, size := range []string{"511", "512", "3000", "4Mi", "64KB", "64K", "-1", "1e3", "18446744073709551616", "0x1000", "", "Ki", " 65536"} {
		if _, err := ParseParams(map[string]string{"clusterSize": size}); !errors.Is(err, ErrInvalid) {
			t.Errorf("clusterSize=%q: got %v", size, err)
		}
	}
	got, err := ParseParams(map[string]string{"clusterSize": "2Mi", "lazyRefcounts": "true", "preallocation": "metadata",
		"directIO": "true", "discard": "false", "cloneMode": "linked", "extendedL2": "false"})
	want := Params{ClusterSize: 2 << 20, LazyRefcounts: true, Preallocation: qcow2.PreallocationMetadata, DirectIO: true}
	if err != nil || got != want {
		t.Fatalf("got %+v, %v, want %+v", got, err, want)
	}
	for _, mode := range []CloneMode{CloneCopy, CloneReflink, CloneAuto} {
		if got, err := ParseParams(map[string]string{"cloneMode": string(mode)}); err != nil || got.CloneMode != mode {
			t.Errorf("cloneMode=%q: got %q, %v", mode, got.CloneMode, err)
		}
	}
}

// TestParamsReachTheImage makes volumes with each parameter and reads them back.
func TestParamsReachTheImage(t *testing.T) {
	p := newPool(t)
	for _, c := range []string{"4096", "64Ki", "2Mi"} {
		for _, prealloc := range []string{"off", "metadata", "falloc", "full"} {
			params, err := ParseParams(map[string]string{"clusterSize": c, "preallocation": prealloc, "lazyRefcounts": "true"})
			if err != nil {
				t.Fatal(err)
			}
			v, err := p.Create(t.Context(), CreateRequest{Name: c + prealloc, Size: SizeRange{Required: 8 << 20}, Params: params})
			if err != nil {
				t.Fatalf("%s %s: %v", c, prealloc, err)
			}
			write(t, p, v.ID, 1<<20, 7, 100000)
			wantBytes(t, p, v.ID, 1<<20, 7, 100000)
		}
	}
}

func TestNames(t *testing.T) {
	p := newPool(t)
	for _, name := range []string{"", "a\nb", "a\x00", "\xff", strings.Repeat("x", 129)} {
		if _, err := p.Create(t.Context(), CreateRequest{Name: name, Params: DefaultParams()}); !errors.Is(err, ErrInvalid) {
			t.Errorf("name %q: got %v", name, err)
		}
	}
	for _, name := range []string{"../../etc/passwd", "/", ".", "a/b", "ü", strings.Repeat("x", 128), "vol-x"} {
		v := create(t, p, name, Source{})
		if !volumeIDPattern.MatchString(v.ID) {
			t.Errorf("name %q: ID %q", name, v.ID)
		}
	}
	for _, id := range []string{"", ".", "..", "../x", "/etc", "a/b", "%2e%2e", "vol-00000000-0000000000000000000000000000000g",
		"vol-" + p.ID() + "-" + strings.Repeat("0", 33), "vol-" + p.ID() + "-" + strings.Repeat("0", 32), "VOL-" + p.ID() + "-" + strings.Repeat("0", 32)} {
		if _, err := p.Get(id); !errors.Is(err, ErrNotFound) {
			t.Errorf("get %q: %v", id, err)
		}
		if err := p.Delete(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("delete %q: %v", id, err)
		}
		if _, err := p.Open(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("open %q: %v", id, err)
		}
		if err := p.DeleteSnapshot(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("delete snapshot %q: %v", id, err)
		}
	}
}

func TestListPages(t *testing.T) {
	p := newPool(t)
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		create(t, p, name, Source{})
	}
	var got []string
	token := ""
	for {
		page, next, err := p.List(token, 2)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range page {
			got = append(got, v.ID)
		}
		if len(got) == 2 { // the last of a page goes between pages
			remove(t, p, got[1])
		}
		if token = next; token == "" {
			break
		}
	}
	if len(got) != 5 {
		t.Fatalf("got %d volumes, want 5", len(got))
	}
	if _, _, err := p.List("invalid-token", 0); !errors.Is(err, ErrBadToken) {
		t.Fatalf("bad token: %v", err)
	}
}

func TestExpandWhileOpen(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	d := open(t, p, v.ID)
	for _, size := range []int64{16 << 20, 16 << 20, 8 << 20} {
		got, err := p.Expand(t.Context(), v.ID, SizeRange{Required: size})
		if err != nil || got.Size != 16<<20 || d.Image.Size() != 16<<20 {
			t.Fatalf("expand to %d: got %d, image %d, %v", size, got.Size, d.Image.Size(), err)
		}
	}
	if _, err := p.Expand(t.Context(), v.ID, SizeRange{Required: 4 << 20, Limit: 8 << 20}); !errors.Is(err, ErrOutOfRange) {
		t.Fatalf("limit below the size: %v", err)
	}
	if _, err := p.Expand(t.Context(), "vol-x", SizeRange{Required: 4 << 20}); !errors.Is(err, ErrNotFound) {
		t.Fatalf("unknown volume: %v", err)
	}
	if err := p.Delete(t.Context(), v.ID); !errors.Is(err, ErrInUse) {
		t.Fatalf("delete an open volume: %v", err)
	}
}

// TestOpenLocksOutOthers: while a volume is open, qemu-img refuses it.
func TestOpenLocksOutOthers(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	image := filepath.Join(p.Path(), volumeDir(v.ID), diskName)
	d := open(t, p, v.ID)
	if _, err := qcow2.OpenFile(image, qcow2.FileOptions{Lock: qcow2.LockWrite}); !errors.Is(err, qcow2.ErrLocked) {
		t.Fatalf("second writer: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := qcow2.OpenFile(image, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Open(t.Context(), v.ID); !errors.Is(err, qcow2.ErrLocked) {
		t.Fatalf("open what another process writes: %v", err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, p, v.ID, 0, 0, 4096)
}

func TestPoolIsOwnedOnce(t *testing.T) {
	p := newPool(t)
	if _, err := Open(t.Context(), p.Path(), Options{}); !errors.Is(err, ErrPoolInUse) {
		t.Fatalf("got %v, want ErrPoolInUse", err)
	}
}

func TestOpenRefusesWhatIsNoPool(t *testing.T) {
	for name, make := range map[string]func(dir string) error{
		"not empty":      func(dir string) error { return os.WriteFile(filepath.Join(dir, "x"), nil, 0o600) },
		"others write":   func(dir string) error { return os.Chmod(dir, 0o777) },
		"damaged marker": func(dir string) error { return os.WriteFile(filepath.Join(dir, poolRecordName), []byte("{}"), 0o600) },
		"foreign volume": func(dir string) error {
			p, err := Open(t.Context(), dir, Options{})
			if err != nil {
				return err
			}
			if err := p.Close(); err != nil {
				return err
			}
			return os.Mkdir(filepath.Join(dir, volumesDir, "x"), 0o700)
		},
	} {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := make(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, ErrNotPool) {
			t.Errorf("%s: got %v, want ErrNotPool", name, err)
		}
	}
}

// TestDamagedRecordIsKept: a volume whose record does not decode cannot be
// used, is reported, and stays as it is.
func TestDamagedRecordIsKept(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir, Options{})
	v := create(t, p, "v", Source{})
	well := create(t, p, "well", Source{})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	record := filepath.Join(dir, volumeDir(v.ID), volumeRecName)
	b, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(record, b, 0o600); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{})
	defer p.Close()
	if problem, err := p.Health(v.ID); err != nil || !errors.Is(problem, ErrDamaged) {
		t.Fatalf("health: %v, %v", problem, err)
	}
	for _, err := range []error{
		func() error { _, err := p.Get(v.ID); return err }(),
		func() error { _, err := p.Open(t.Context(), v.ID); return err }(),
		p.Delete(t.Context(), v.ID),
	} {
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("got %v, want ErrDamaged", err)
		}
	}
	reap(t, p)
	if _, err := os.Stat(record); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, p, well.ID, 0, 0, 4096)
}

// An empty mount point that is immutable does not become a pool, and the error says
// what is missing there.
func TestImmutableMountPoint(t *testing.T) {
	const immutable = 0x10 // FS_IMMUTABLE_FL of linux/fs.h
	dir := newFilesystem(t, "xfs")
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	set := func(flags int) {
		t.Helper()
		if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags); err != nil {
			t.Fatal(err)
		}
	}
	set(immutable)
	_, err = Open(t.Context(), dir, Options{})
	set(0)
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "mount its file system") {
		t.Errorf("open: %v, want what to mount", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("the mount point holds %v, %v", left, err)
	}
}

// A creation whose last step has failed is not there, and can be done again: what it
// reads from has not gone meanwhile.
func TestCreateAgainAfterAFailedPublication(t *testing.T) {
	const n = 1 << 20
	dir := storagetest.MemoryDir(t)
	var fail atomic.Bool
	step := func(what string) error {
		if strings.HasPrefix(what, "after rename "+incomingDir+"/vol-") && fail.Swap(false) {
			return unix.EIO
		}
		return nil
	}
	p := openPool(t, dir, Options{step: step})
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	fail.Store(true)
	req := CreateRequest{Name: "c", Params: DefaultParams(), Source: Source{Volume: a.ID}}
	if _, err := p.Create(t.Context(), req); !errors.Is(err, unix.EIO) {
		t.Fatalf("got %v, want EIO", err)
	}
	reap(t, p)
	if _, err := p.Create(t.Context(), req); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = newPoolIn(t, dir)
	c, err := p.Create(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	wantBytes(t, p, c.ID, 0, 1, n)
}
