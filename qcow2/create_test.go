package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// createMatrix is every cluster size with every refcount width, and the other
// options with some.
func createMatrix() []qcow2.CreateOptions {
	var list []qcow2.CreateOptions
	for clusterSize := int64(512); clusterSize <= 2<<20; clusterSize *= 2 {
		list = append(list, qcow2.CreateOptions{Version: 2, ClusterSize: clusterSize})
		for bits := 1; bits <= 64; bits *= 2 {
			list = append(list, qcow2.CreateOptions{ClusterSize: clusterSize, RefcountBits: bits})
		}
	}
	for _, p := range []qcow2.Preallocation{qcow2.PreallocationMetadata, qcow2.PreallocationFalloc, qcow2.PreallocationFull} {
		for _, bits := range []int{1, 16, 64} {
			list = append(list,
				qcow2.CreateOptions{Preallocation: p, ClusterSize: 512, RefcountBits: bits},
				qcow2.CreateOptions{Preallocation: p, ClusterSize: 65536, RefcountBits: bits})
		}
	}
	return append(list,
		qcow2.CreateOptions{},
		qcow2.CreateOptions{LazyRefcounts: true},
		qcow2.CreateOptions{CompressionType: "zstd"},
		qcow2.CreateOptions{ClusterSize: 512, BackingFile: "base.raw", BackingFormat: "raw"},
		qcow2.CreateOptions{Version: 2, BackingFile: "base.raw", BackingFormat: "raw"},
		qcow2.CreateOptions{LazyRefcounts: true, CompressionType: "zstd", BackingFile: strings.Repeat("./", 500) + "base.raw", BackingFormat: "raw"},
	)
}

// TestCreateMatrix lets QEMU judge and describe what Create makes.
func TestCreateMatrix(t *testing.T) {
	dir := scratch(t)
	if err := os.WriteFile(filepath.Join(dir, "base.raw"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	const size = 3<<20 + 512
	for _, o := range createMatrix() {
		t.Run(fmt.Sprintf("%+v", o), func(t *testing.T) {
			path := filepath.Join(dir, "im.qcow2")
			createFile(t, path, size-100, o)
			defer os.Remove(path)
			verifyFile(t, path)
			i := qemutest.GetInfo(t, path)
			d := i.FormatSpecific.Data
			got := qcow2.CreateOptions{Version: 3, ClusterSize: i.ClusterSize, RefcountBits: d.RefcountBits, LazyRefcounts: d.LazyRefcounts,
				CompressionType: d.CompressionType, BackingFile: i.BackingFilename, BackingFormat: o.BackingFormat, Preallocation: o.Preallocation}
			if d.Compat == "0.10" {
				got.Version = 2
			}
			want := o
			if want.Version == 0 {
				want.Version = 3
			}
			if want.ClusterSize == 0 {
				want.ClusterSize = 65536
			}
			if want.RefcountBits == 0 {
				want.RefcountBits = 16
			}
			if want.CompressionType == "" {
				want.CompressionType = "zlib"
			}
			if got != want || i.VirtualSize != size || d.Corrupt || i.DirtyFlag {
				t.Errorf("qemu-img info: %+v", i)
			}
			r, _ := qemutest.Judge(t, path)
			if all := o.Preallocation != ""; all != (r.AllocatedClusters == r.TotalClusters) || r.FragmentedClusters != 0 {
				t.Errorf("qemu-img check: %+v", r)
			}
			if o.BackingFile == "" {
				if b, ok := content(t, path); !ok || len(b) != size || strings.Trim(string(b), "\x00") != "" {
					t.Errorf("the new image does not read as %d zeroes", size)
				}
			}
		})
	}
}

// TestCreateLarge: what is not used takes no space, however large the disk.
func TestCreateLarge(t *testing.T) {
	for _, c := range []struct {
		size int64
		o    qcow2.CreateOptions
		most int64 // host bytes
	}{
		{1 << 40, qcow2.CreateOptions{}, 64 << 10},
		{2 << 40, qcow2.CreateOptions{}, 64 << 10},
		{2 << 40, qcow2.CreateOptions{ClusterSize: 4096}, 128 << 10},
		{1 << 60, qcow2.CreateOptions{ClusterSize: 2 << 20}, 64 << 10},
		{16 << 30, qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64}, 1 << 20},
	} {
		path := filepath.Join(scratch(t), "im.qcow2")
		createFile(t, path, c.size, c.o)
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if used := st.Sys().(*syscall.Stat_t).Blocks * 512; used > c.most {
			t.Errorf("%d bytes with %+v take %d host bytes, want at most %d", c.size, c.o, used, c.most)
		}
		verifyFile(t, path)
		if i := qemutest.GetInfo(t, path); i.VirtualSize != c.size {
			t.Errorf("qemu-img info: size %d, want %d", i.VirtualSize, c.size)
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		size int64
		o    qcow2.CreateOptions
		text []string
	}{
		{"version", 512, qcow2.CreateOptions{Version: 4}, []string{"version 4", "use 2 or 3"}},
		{"cluster size", 512, qcow2.CreateOptions{ClusterSize: 1000}, []string{"cluster size 1000", "power of two from 512 to 2097152"}},
		{"small clusters", 512, qcow2.CreateOptions{ClusterSize: 256}, []string{"cluster size 256"}},
		{"large clusters", 512, qcow2.CreateOptions{ClusterSize: 4 << 20}, []string{"cluster size 4194304"}},
		{"refcount width", 512, qcow2.CreateOptions{RefcountBits: 3}, []string{"refcount width 3", "1, 2, 4, 8, 16, 32 or 64"}},
		{"compression", 512, qcow2.CreateOptions{CompressionType: "lzma"}, []string{`"lzma"`, "zlib or zstd"}},
		{"version 2", 512, qcow2.CreateOptions{Version: 2, LazyRefcounts: true, RefcountBits: 8, CompressionType: "zstd"},
			[]string{"lazy refcounts need version 3", "refcount width 8 needs version 3", `"zstd" needs version 3`}},
		{"backing name", 512, qcow2.CreateOptions{BackingFile: strings.Repeat("x", 1024), BackingFormat: "raw"}, []string{"1024 bytes", "at most 1023"}},
		{"backing name in small clusters", 512, qcow2.CreateOptions{ClusterSize: 512, BackingFile: strings.Repeat("x", 500), BackingFormat: "raw"}, []string{"500 bytes", "at most 376"}},
		{"backing format", 512, qcow2.CreateOptions{BackingFile: "x"}, []string{`backing format ""`, "qcow2 or raw"}},
		{"backing file", 512, qcow2.CreateOptions{BackingFormat: "raw"}, []string{"without a backing file"}},
		{"preallocation", 512, qcow2.CreateOptions{Preallocation: "some"}, []string{`"some"`, "off, metadata, falloc or full"}},
		{"preallocated overlay", 512, qcow2.CreateOptions{Preallocation: "full", BackingFile: "x", BackingFormat: "raw"}, []string{"hide the backing file"}},
		{"negative size", -1, qcow2.CreateOptions{}, []string{"size -1"}},
		{"L1 limit", 1<<37 + 1, qcow2.CreateOptions{ClusterSize: 512}, []string{"use larger clusters"}},
		{"refcount table limit", 1 << 37, qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64, Preallocation: "metadata"}, []string{"cannot be preallocated"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := storagetest.NewDisk()
			err := qcow2.Create(t.Context(), d, c.size, c.o)
			if err == nil {
				t.Fatal("no error")
			}
			for _, text := range c.text {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("got %q, want %q in it", err, text)
				}
			}
			if strings.HasSuffix(c.name, "limit") != errors.Is(err, qcow2.ErrTooLarge) && c.name != "negative size" {
				t.Errorf("ErrTooLarge: %v", err)
			}
			if n := d.Count(storagetest.OpChange); n != 0 {
				t.Errorf("%d changes of the file", n)
			}
		})
	}
	d := storagetest.NewDisk()
	if _, err := d.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Create(t.Context(), d, 512, qcow2.CreateOptions{}); err == nil || !strings.Contains(err.Error(), "truncate it first") {
		t.Errorf("a file that is not empty: %v", err)
	}
}

// TestCreatePowerLoss: after a crash there is a whole image or none.
func TestCreatePowerLoss(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 512, RefcountBits: 64, Preallocation: "metadata"}, {ClusterSize: 4096, Preallocation: "full"},
	} {
		d := storagetest.NewDisk()
		log := d.Record()
		const size = 64 << 10
		if err := qcow2.Create(t.Context(), d, size, o); err != nil {
			t.Fatal(err)
		}
		end := d.Position()
		whole, none := 0, 0
		for s := range log.States(newRand(t), 4) {
			after := s.Disk()
			r, err := qcow2.CheckFile(t.Context(), after, qcow2.CheckOptions{})
			switch {
			case errors.Is(err, qcow2.ErrNotQcow2) && s.At < end:
				none++
			case err != nil || !r.Clean():
				t.Errorf("%+v, after event %d, %s: %v %+v", o, s.At, s.What, err, r)
			default:
				whole++
			}
		}
		if whole == 0 || none == 0 {
			t.Errorf("%+v: %d whole images, %d without header", o, whole, none)
		}
	}
}

// TestCreateFaults: every error of the file surfaces, and leaves no image.
func TestCreateFaults(t *testing.T) {
	o := qcow2.CreateOptions{ClusterSize: 512, Preallocation: "falloc"}
	boom := errors.New("boom")
	for n := 1; ; n++ {
		d := storagetest.NewDisk()
		f := &storagetest.Fault{Ops: storagetest.OpChange, N: n, Err: boom}
		d.Inject(f)
		err := qcow2.Create(t.Context(), d, 256<<10, o)
		if d.Hits(f) == 0 {
			if err != nil || n < 6 {
				t.Errorf("%d operations, then %v", n-1, err)
			}
			return
		}
		if !errors.Is(err, boom) {
			t.Errorf("operation %d fails, Create returns %v", n, err)
		}
	}
}

func TestMeasureAgreesWithQemu(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for _, o := range []qcow2.CreateOptions{
		{}, {ClusterSize: 512}, {ClusterSize: 4096, RefcountBits: 64}, {ClusterSize: 2 << 20, RefcountBits: 1},
		{Preallocation: "metadata"}, {Preallocation: "falloc"}, {Preallocation: "full", ClusterSize: 1024},
	} {
		for range 3 {
			size := rng.Int64N(1<<30)&^511 + 512
			opts := "preallocation=off"
			if o.ClusterSize != 0 {
				opts += fmt.Sprintf(",cluster_size=%d", o.ClusterSize)
			}
			if o.RefcountBits != 0 {
				opts += fmt.Sprintf(",refcount_bits=%d", o.RefcountBits)
			}
			if o.Preallocation != "" {
				opts += ",preallocation=" + string(o.Preallocation)
			}
			out := qemutest.Img(t, "measure", "-O", "qcow2", "-o", opts, "--size", fmt.Sprint(size))
			required, full := qcow2.Measure(size, 0, o)
			if got := fmt.Sprintf("required size: %d\nfully allocated size: %d\n", required, full); got != out {
				t.Errorf("%d bytes with %+v:\ngot\n%s\nqemu-img\n%s", size, o, got, out)
			}
		}
	}
	path := filepath.Join(scratch(t), "im.qcow2")
	createFile(t, path, 64<<20, qcow2.CreateOptions{})
	qemutest.IO(t, path, "write 0 1M", "write 10M 64k")
	required, full := qcow2.Measure(64<<20, 1<<20+64<<10, qcow2.CreateOptions{ClusterSize: 4096})
	if got, want := fmt.Sprintf("required size: %d\nfully allocated size: %d\nbitmaps size: 0\n", required, full),
		qemutest.Img(t, "measure", "-O", "qcow2", "-o", "cluster_size=4096", path); got != want {
		t.Errorf("an image with data:\ngot\n%s\nqemu-img\n%s", got, want)
	}
}

// TestCreateHead compares disks that begin with data, in front of a backing file
// and without, with what the data and the file say; QEMU judges the images.
func TestCreateHead(t *testing.T) {
	dir := scratch(t)
	const size = 3<<20 + 512
	base := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(base) // never fails
	if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512, RefcountBits: 1, BackingFile: "base.raw", BackingFormat: "raw"},
		{BackingFile: "base.raw", BackingFormat: "raw"},
		{ClusterSize: 2 << 20, Preallocation: qcow2.PreallocationMetadata},
		{Preallocation: qcow2.PreallocationFull},
		{},
	} {
		for _, n := range []int{0, 1, 512, 65536, 65537, 1 << 20, size} {
			t.Run(fmt.Sprintf("%+v/%d", o, n), func(t *testing.T) {
				path := filepath.Join(dir, "im.qcow2")
				defer os.Remove(path)
				head := make([]byte, n)
				rand.NewChaCha8([32]byte{2}).Read(head) // never fails
				createEmpty(t, path)
				f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(qcow2.CreateHead(t.Context(), f, size, o, head), f.Close()); err != nil {
					t.Fatal(err)
				}
				verifyFile(t, path)
				want := make([]byte, size)
				if o.BackingFile != "" {
					copy(want, base)
				}
				cluster := int(o.ClusterSize)
				if cluster == 0 {
					cluster = 65536
				}
				end := min((n+cluster-1)/cluster*cluster, size)
				clear(want[copy(want, head):end])
				raw := filepath.Join(dir, "im.raw")
				defer os.Remove(raw)
				qemutest.Img(t, "convert", "-f", "qcow2", "-O", "raw", path, raw)
				got, err := os.ReadFile(raw)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("the disk differs from head and what is behind it, first at %#x", firstDifference(got, want))
				}
			})
		}
	}
}

// TestCreateHeadTooLong checks that nothing is made of data that does not fit.
func TestCreateHeadTooLong(t *testing.T) {
	f := storagetest.NewDisk()
	err := qcow2.CreateHead(t.Context(), f, 1024, qcow2.CreateOptions{}, make([]byte, 1025))
	if n, _ := f.Size(); err == nil || n != 0 {
		t.Fatalf("error %v, file of %d bytes", err, n)
	}
}
