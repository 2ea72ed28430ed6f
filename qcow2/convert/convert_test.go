package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A fakeDisk is a disk whose extents are given.
type fakeDisk struct {
	content []byte
	extents []qcow2.Extent // ascending, without gaps
	fail    error          // of reads and writes that touch failAt
	failAt  int64
	read    atomic.Int64 // bytes
	status  atomic.Int64 // calls of BlockStatus
	onRead  func()
}

func (d *fakeDisk) touch(n int, off int64) error {
	if d.fail != nil && off <= d.failAt && d.failAt < off+int64(n) {
		return d.fail
	}
	return nil
}

func (d *fakeDisk) ReadAt(p []byte, off int64) (int, error) {
	if d.onRead != nil {
		d.onRead()
	}
	d.read.Add(int64(len(p)))
	return copy(p, d.content[off:]), d.touch(len(p), off)
}

func (d *fakeDisk) WriteAt(p []byte, off int64) (int, error) {
	return copy(d.content[off:], p), d.touch(len(p), off)
}

func (d *fakeDisk) WriteZeroes(off, n int64, _ bool) error {
	clear(d.content[off : off+n])
	return d.touch(int(n), off)
}
func (d *fakeDisk) Discard(int64, int64) error { return nil }
func (d *fakeDisk) Flush() error               { return nil }
func (d *fakeDisk) Size() int64                { return int64(len(d.content)) }
func (d *fakeDisk) Close() error               { return nil }

func (d *fakeDisk) BlockStatus(_ context.Context, off, n int64) (qcow2.Extent, error) {
	d.status.Add(1)
	for _, e := range d.extents {
		if off < e.End() {
			cut := off - e.Off
			e.Off, e.Len = off, min(e.Len-cut, n)
			if e.HostOff >= 0 {
				e.HostOff += cut
			}
			return e, nil
		}
	}
	return qcow2.Extent{Off: off, Len: n, Data: true, Allocated: true, HostOff: off}, nil
}

// randomDisk returns a disk of random extents; zero ones hold zeroes.
func randomDisk(rng *rand.Rand, size int64) *fakeDisk {
	d := &fakeDisk{content: make([]byte, size)}
	for off := int64(0); off < size; {
		e := qcow2.Extent{Off: off, Len: min(size-off, 1+rng.Int64N(1<<rng.IntN(18))), Depth: rng.IntN(3), HostOff: -1}
		switch rng.IntN(4) {
		case 0:
			e.Zero = true
		case 1:
			e.Zero, e.Allocated = true, true
		default:
			e.Allocated, e.Data, e.HostOff = true, true, off
			for i := range e.Len {
				d.content[off+i] = byte(rng.Uint32() | 1)
			}
			if rng.IntN(2) == 0 && e.Len > 20000 { // a run of zeroes in the data
				clear(d.content[off+5000 : off+18000])
			}
		}
		d.extents = append(d.extents, e)
		off = e.End()
	}
	return d
}

// TestSegments compares the segments of random disks with a classification of
// every granule by itself.
func TestSegments(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 0))
		size := 1 + rng.Int64N(300000)
		d := randomDisk(rng, size)
		granule := int64(512) << rng.IntN(8)
		backing := rng.IntN(2) == 0
		var want []kind
		for off := int64(0); off < size; off += granule {
			k, first := keep, true
			for _, e := range d.extents {
				if e.End() <= off || e.Off >= min(off+granule, size) {
					continue
				}
				if ek := kindOf(e, backing); first {
					k, first = ek, false
				} else if k != ek {
					k = data
				}
			}
			want = append(want, k)
		}
		var got []kind
		end, last := int64(0), kind(99)
		for s, err := range segments(t.Context(), d, size, granule, backing) {
			if err != nil {
				t.Fatal(err)
			}
			if s.off != end || s.off >= s.end || s.off%granule != 0 || s.end%granule != 0 && s.end != size || s.kind == last && s.kind != data {
				t.Fatalf("seed %d: segment %+v after %d of kind %d, granule %d, size %d", seed, s, end, last, granule, size)
			}
			for off := s.off; off < s.end; off += granule {
				got = append(got, s.kind)
			}
			end, last = s.end, s.kind
		}
		if end != size || !slices.Equal(got, want) {
			t.Fatalf("seed %d: granules %v, want %v; end %d of %d", seed, got, want, end, size)
		}
	}
}

func TestRun(t *testing.T) {
	b := make([]byte, 20000)
	b[9000] = 1
	for _, tt := range []struct {
		from, to, off, granule int64
		n                      int
		zero                   bool
	}{
		{0, 20000, 0, 4096, 8192, true},
		{8192, 20000, 8192, 4096, 4096, false},
		{12288, 20000, 12288, 4096, 7712, true},
		{0, 20000, 100, 4096, 8092, true}, // granules count from offset 0 of the disk
		{8092, 20000, 8192, 4096, 4096, false},
		{0, 20000, 0, 65536, 20000, false},
		{0, 9000, 0, 65536, 9000, true},
	} {
		if n, zero := run(b[tt.from:tt.to], tt.off, tt.granule); n != tt.n || zero != tt.zero {
			t.Errorf("run(b[%d:%d], %d, %d) = %d, %v; want %d, %v", tt.from, tt.to, tt.off, tt.granule, n, zero, tt.n, tt.zero)
		}
	}
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 7, 511, 4095, 4096, 4097, 70000} {
		b := make([]byte, n)
		if !qcow2.IsZero(b) {
			t.Errorf("%d zeroes are not zero", n)
		}
		for _, at := range []int{0, n / 3, n / 2, n - 1} {
			if at < 0 || at >= n {
				continue
			}
			b[at] = 0x80
			if qcow2.IsZero(b) {
				t.Errorf("%d bytes with one set at %d are zero", n, at)
			}
			b[at] = 0
		}
	}
}

// openImage makes an image in memory.
func openImage(t *testing.T, size int64, o qcow2.CreateOptions, backing qcow2.Disk) *qcow2.Image {
	t.Helper()
	f := storagetest.NewDisk()
	if err := qcow2.Create(t.Context(), f, size, o); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), f, qcow2.Options{OpenBacking: func(context.Context, string, string) (qcow2.Disk, error) {
		return backing, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r, err := im.Check(context.Background(), qcow2.CheckOptions{})
		if err != nil || !r.Clean() {
			t.Errorf("check: %+v, %v", r, err)
		}
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	return im
}

// fill makes random requests of every kind that changes d.
func fill(t *testing.T, d qcow2.Disk, rng *rand.Rand, requests int) {
	t.Helper()
	for range requests {
		off := rng.Int64N(d.Size())
		n := min(1+rng.Int64N(1<<(6+rng.IntN(14))), d.Size()-off)
		var err error
		switch rng.IntN(6) {
		case 0:
			err = d.WriteZeroes(off, n, true)
		case 1:
			err = d.Discard(off, n)
		default:
			p := make([]byte, n)
			if rng.IntN(4) > 0 {
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
			}
			_, err = d.WriteAt(p, off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func content(t *testing.T, d qcow2.Disk) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestCopy copies a chain of two images with every option to targets of
// different cluster sizes.
func TestCopy(t *testing.T) {
	const size = 2<<20 + 1536
	rng := rand.New(rand.NewPCG(7, 7))
	base := openImage(t, size-1<<20, qcow2.CreateOptions{ClusterSize: 4096}, nil)
	fill(t, base, rng, 30)
	src := openImage(t, size, qcow2.CreateOptions{ClusterSize: 16384, BackingFile: "base", BackingFormat: "qcow2"}, noClose{base})
	fill(t, src, rng, 30)
	want := content(t, src)

	for _, cluster := range []int64{512, 4096, 65536, 2 << 20} {
		for name, o := range map[string]Options{
			"default":        {},
			"zero target":    {TargetIsZero: true},
			"any order":      {AnyOrder: true, Workers: 16, TargetIsZero: true},
			"one worker":     {Workers: 1},
			"compressed":     {Compressed: true, TargetIsZero: true},
			"all data":       {WriteZeroData: true},
			"no zero search": {NoZeroDetect: true},
			"keep space":     {KeepSpace: true},
			"coarse":         {Granule: 1 << 20, TargetIsZero: true},
		} {
			t.Run(fmt.Sprintf("%d/%s", cluster, name), func(t *testing.T) {
				dst := openImage(t, size, qcow2.CreateOptions{ClusterSize: cluster}, nil)
				if !o.TargetIsZero { // what was there must go
					fill(t, dst, rng, 10)
				}
				if o.Granule == 0 {
					o.Granule = cluster
				}
				done := int64(0)
				o.Progress = func(n int64) { done = n }
				if err := Copy(t.Context(), dst, src, o); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(content(t, dst), want) {
					t.Error("the copy differs")
				}
				if done != src.Size() {
					t.Errorf("progress ended at %d of %d", done, src.Size())
				}
				if d, err := Compare(t.Context(), src, dst, CompareOptions{}); err != nil || d.Kind != Equal {
					t.Errorf("Compare = %+v, %v", d, err)
				}
			})
		}
	}
}

// TestCopyOntoBacking copies an overlay to one of the same backing file: only
// what the overlay holds may be written.
func TestCopyOntoBacking(t *testing.T) {
	const size = 4 << 20
	rng := rand.New(rand.NewPCG(3, 1))
	for _, cluster := range []int64{512, 65536} {
		for _, compressed := range []bool{false, true} {
			base := openImage(t, size, qcow2.CreateOptions{}, nil)
			fill(t, base, rng, 40)
			shared := noClose{base}
			o := qcow2.CreateOptions{BackingFile: "base", BackingFormat: "qcow2", ClusterSize: cluster}
			src := openImage(t, size, qcow2.CreateOptions{BackingFile: "base", BackingFormat: "qcow2"}, shared)
			if _, err := src.WriteAt(bytes.Repeat([]byte{5}, 70000), 1<<20+100); err != nil {
				t.Fatal(err)
			}
			if err := src.WriteZeroes(2<<20, 1<<20, true); err != nil {
				t.Fatal(err)
			}
			dst := openImage(t, size, o, shared)
			if err := Copy(t.Context(), dst, src, Options{Granule: cluster, TargetHasBacking: true, Compressed: compressed, TargetIsZero: true}); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(content(t, dst), content(t, src)) {
				t.Errorf("cluster size %d: the copy differs", cluster)
			}
			for e, err := range Extents(t.Context(), dst, 0, 1<<20) {
				if err != nil || e.Depth == 0 && e.Allocated {
					t.Errorf("cluster size %d: %+v is in the copy, not in its backing file (%v)", cluster, e, err)
				}
			}
		}
	}
}

// noClose is a disk that several images share.
type noClose struct{ qcow2.Disk }

func (noClose) Close() error { return nil }

// TestCopyCostsWhatIsThere copies 1 TiB with 1 MiB of data at each end.
func TestCopyCostsWhatIsThere(t *testing.T) {
	const size = 1 << 40
	src := openImage(t, size, qcow2.CreateOptions{}, nil)
	for _, off := range []int64{0, size - 1<<20} {
		if _, err := src.WriteAt(bytes.Repeat([]byte{1}, 1<<20), off); err != nil {
			t.Fatal(err)
		}
	}
	counted := &countingDisk{Disk: src}
	dst := openImage(t, size, qcow2.CreateOptions{}, nil)
	if err := Copy(t.Context(), dst, counted, Options{TargetIsZero: true, Granule: 65536}); err != nil {
		t.Fatal(err)
	}
	if n := counted.read.Load(); n != 2<<20 {
		t.Errorf("%d bytes were read, want %d", n, 2<<20)
	}
	if n := counted.status.Load(); n > 3 {
		t.Errorf("the block status was asked for %d times, want 3", n)
	}
}

type countingDisk struct {
	qcow2.Disk
	read, status atomic.Int64
}

func (d *countingDisk) ReadAt(p []byte, off int64) (int, error) {
	d.read.Add(int64(len(p)))
	return d.Disk.ReadAt(p, off)
}

func (d *countingDisk) BlockStatus(ctx context.Context, off, n int64) (qcow2.Extent, error) {
	d.status.Add(1)
	return d.Disk.BlockStatus(ctx, off, n)
}

func TestCopyErrors(t *testing.T) {
	broken := errors.New("broken")
	disk := func() *fakeDisk { return randomDisk(rand.New(rand.NewPCG(1, 1)), 20<<20) }
	at := func(d *fakeDisk) int64 { // an offset that holds data
		for _, e := range d.extents {
			if e.Data && e.Off > 10<<20 {
				return e.Off
			}
		}
		t.Fatal("no data")
		return 0
	}
	for _, anyOrder := range []bool{false, true} {
		src, dst := disk(), disk()
		src.fail, src.failAt = broken, at(src)
		if err := Copy(t.Context(), dst, src, Options{AnyOrder: anyOrder}); !errors.Is(err, broken) {
			t.Errorf("the source fails: %v", err)
		}
		src, dst = disk(), disk()
		dst.fail, dst.failAt = broken, at(dst)
		if err := Copy(t.Context(), dst, src, Options{AnyOrder: anyOrder}); !errors.Is(err, broken) {
			t.Errorf("the target fails: %v", err)
		}
		src, dst = disk(), disk()
		ctx, cancel := context.WithCancel(t.Context())
		src.onRead = cancel
		if err := Copy(ctx, dst, src, Options{AnyOrder: anyOrder}); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
		cancel()
	}
	src := disk()
	if err := Copy(t.Context(), &fakeDisk{content: make([]byte, 100)}, src, Options{}); !errors.Is(err, qcow2.ErrOutOfRange) {
		t.Errorf("the target is too small: %v", err)
	}
	if err := Copy(t.Context(), disk(), src, Options{Compressed: true}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("the target cannot compress: %v", err)
	}
}

func TestCompare(t *testing.T) {
	clone := func(d *fakeDisk) *fakeDisk {
		return &fakeDisk{content: slices.Clone(d.content), extents: d.extents}
	}
	a := randomDisk(rand.New(rand.NewPCG(2, 2)), 5<<20)
	rng := rand.New(rand.NewPCG(9, 9))
	for range 100 {
		b := clone(a)
		b.extents = nil // all data
		off := rng.Int64N(a.Size())
		b.content[off] ^= 0x10
		if later := off + rng.Int64N(a.Size()-off); later != off {
			b.content[later] ^= 0x01
		}
		want := Difference{ContentDiffer, off &^ 511}
		for _, pair := range [][2]qcow2.Disk{{a, b}, {b, a}} {
			if got, err := Compare(t.Context(), pair[0], pair[1], CompareOptions{}); err != nil || got != want {
				t.Fatalf("Compare = %+v, %v; want %+v", got, err, want)
			}
		}
	}
	if got, err := Compare(t.Context(), a, clone(a), CompareOptions{Strict: true}); err != nil || got.Kind != Equal {
		t.Errorf("equal disks: %+v, %v", got, err)
	}
	longer := clone(a)
	longer.content = append(longer.content, make([]byte, 1<<20)...)
	if got, err := Compare(t.Context(), a, longer, CompareOptions{}); err != nil || got.Kind != Equal {
		t.Errorf("longer by zeroes: %+v, %v", got, err)
	}
	if got, err := Compare(t.Context(), longer, a, CompareOptions{Strict: true}); err != nil || got.Kind != SizeDiffer {
		t.Errorf("longer, strict: %+v, %v", got, err)
	}
	longer.content[5<<20+1000] = 1
	if got, err := Compare(t.Context(), longer, a, CompareOptions{}); err != nil || got != (Difference{ContentDiffer, 5<<20 + 512}) {
		t.Errorf("longer by data: %+v, %v", got, err)
	}
	other := clone(a)
	other.extents = slices.Clone(a.extents)
	for i := range other.extents {
		if e := &other.extents[i]; e.Zero && e.Off > 1<<20 {
			e.Allocated = !e.Allocated
			want := Difference{StatusDiffer, e.Off}
			if got, err := Compare(t.Context(), a, other, CompareOptions{Strict: true}); err != nil || got != want {
				t.Errorf("other status: %+v, %v; want %+v", got, err, want)
			}
			break
		}
	}
	broken := errors.New("broken")
	other.fail, other.failAt = broken, 4<<20
	other.extents = nil
	if _, err := Compare(t.Context(), a, other, CompareOptions{}); !errors.Is(err, broken) {
		t.Errorf("a disk fails: %v", err)
	}
}

func TestConcat(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	a, b := randomDisk(rng, 100000), randomDisk(rng, 70000)
	c := Concat(a, b)
	want := append(slices.Clone(a.content), b.content...)
	if !bytes.Equal(content(t, c), want) {
		t.Error("wrong content")
	}
	dst := &fakeDisk{content: make([]byte, len(want))}
	if err := Copy(t.Context(), dst, c, Options{TargetIsZero: true}); err != nil || !bytes.Equal(dst.content, want) {
		t.Errorf("the copy differs (%v)", err)
	}
	if _, err := c.ReadAt(make([]byte, 2), c.Size()-1); !errors.Is(err, qcow2.ErrOutOfRange) {
		t.Errorf("read beyond the end: %v", err)
	}
}
