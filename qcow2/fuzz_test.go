package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// fuzzSeeds are images that mutations start from.
func fuzzSeeds(t testing.TB) []*storagetest.Disk {
	t.Helper()
	var seeds []*storagetest.Disk
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512},
		{ClusterSize: 512, RefcountBits: 64, LazyRefcounts: true},
		{ClusterSize: 1024, Version: 2},
		{ClusterSize: 4096, CompressionType: "zstd"},
	} {
		d := newDisk(t, 48<<10, o)
		im := openDisk(t, d, qcow2.Options{})
		if _, err := im.WriteAt(fill(6000, 1), 1000); err != nil {
			t.Fatal(err)
		}
		if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"}); err != nil {
			t.Fatal(err)
		}
		if err := im.WriteCompressed(make([]byte, max(o.ClusterSize, 512)), 8192); err != nil {
			t.Fatal(err)
		}
		if err := im.WriteZeroes(0, 2048, false); err != nil {
			t.Fatal(err)
		}
		mustClose(t, im)
		d.Reopen()
		seeds = append(seeds, d)
	}
	return seeds
}

// mutate changes d as the bytes of script say and returns the unused rest.
//
//	Offset  Size  Field  Meaning
//	     0     1  count  number of changes that follow, modulo 8
//	     n     1  where  0-3 header, 4 L1, 5 L2, 6 refcount table, 7 refcount block, 8 snapshot table, 9 anywhere (modulo 10)
//	   n+1     2  off    offset from there, modulo the cluster size
//	   n+3     1  size   log2 of the field's bytes, modulo 4
//	   n+4     1  how    0-2 value as it is, 3 one bit, 4 another structure's offset, 5 all ones, 6 zero, 7 plus one (modulo 8)
//	   n+5     8  value
func mutate(d *storagetest.Disk, script []byte) []byte {
	if len(script) == 0 {
		return nil
	}
	n := int(script[0] % 8)
	script = script[1:]
	for ; n > 0 && len(script) >= 13; n-- {
		where, off := script[0]%10, int64(binary.BigEndian.Uint16(script[1:]))
		size, how, value := 1<<(script[3]%4), script[4]%8, binary.BigEndian.Uint64(script[5:])
		script = script[13:]
		at := structureAt(d, where) + off%4096
		if where < 4 {
			at = off % 128
		}
		if where >= 4 && where <= 6 {
			at = structureAt(d, where) + off%32*8
		}
		field := make([]byte, 8)
		if m, _ := d.ReadAt(field[8-size:], at); m < size {
			continue
		}
		old := binary.BigEndian.Uint64(field)
		switch how {
		case 3:
			value = old ^ 1<<(value%64)
		case 4:
			value = uint64(structureAt(d, byte(value%10))) | old&(3<<62)
		case 5:
			value = ^uint64(0)
		case 6:
			value = 0
		case 7:
			value = old + 1
		}
		binary.BigEndian.PutUint64(field, value)
		if _, err := d.WriteAt(field[8-size:], at); err != nil {
			panic(err)
		}
	}
	return script
}

// structureAt returns the offset of a structure, by the kinds of mutate.
func structureAt(d *storagetest.Disk, kind byte) int64 {
	field := func(off int64) int64 {
		b := make([]byte, 8)
		if off >= 0 && off < 1<<40 {
			d.ReadAt(b, off)
		}
		return int64(binary.BigEndian.Uint64(b) & 0xfffffffe00)
	}
	switch kind {
	case 4:
		return field(40)
	case 5:
		return field(field(40))
	case 6:
		return field(48)
	case 7:
		return field(field(48))
	case 8:
		return field(64)
	}
	return 0
}

// fuzzOps runs the operations that the bytes of script say, five bytes each.
func fuzzOps(ctx context.Context, im *qcow2.Image, script []byte) error {
	for range 30 {
		if len(script) < 5 {
			return nil
		}
		size := im.Size()
		if size == 0 {
			return nil
		}
		kind := script[0] % 12
		off := int64(binary.BigEndian.Uint16(script[1:])) * 64 % size
		n := min(int64(binary.BigEndian.Uint16(script[3:]))%9000, size-off)
		script = script[5:]
		var err error
		switch kind {
		case 0, 1:
			_, err = im.WriteAt(bytes.Repeat([]byte{0xa5}, int(n)), off)
		case 2, 3:
			_, err = im.ReadAt(make([]byte, n), off)
		case 4:
			err = im.Discard(off, n)
		case 5:
			err = im.WriteZeroes(off, n, n%2 == 0)
		case 6:
			err = im.Flush()
		case 7:
			_, err = im.CreateSnapshot(ctx, qcow2.Snapshot{Name: "f"})
		case 8:
			err = im.DeleteSnapshot(ctx, "s")
		case 9:
			err = im.ApplySnapshot(ctx, "s")
		case 10:
			if size < 1<<20 {
				err = im.Resize(ctx, size+n)
			}
		case 11:
			if n > 0 {
				_, err = im.BlockStatus(ctx, off, n)
			}
		}
		if errors.Is(err, qcow2.ErrFailed) {
			return err
		}
	}
	return nil
}

// FuzzOpen mutates structures of valid images, opens them and uses what opens:
// nothing panics or hangs, memory and file stay bounded, and what Check finds
// clean before is not corrupt after.
func FuzzOpen(f *testing.F) {
	seeds := fuzzSeeds(f)
	ops := []byte{0, 0, 0, 4, 0, 7, 0, 0, 0, 0, 0, 0, 9, 8, 0, 4, 0, 1, 8, 0, 8, 0, 0, 0, 0, 6, 0, 0, 0, 0, 9, 0, 0, 0, 0, 2, 0, 0, 34, 0}
	change := func(where byte, off uint16, size, how byte, value uint64) []byte {
		b := []byte{1, where, 0, 0, size, how, 0, 0, 0, 0, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(b[2:], off)
		binary.BigEndian.PutUint64(b[6:], value)
		return append(b, ops...)
	}
	for i := range seeds {
		f.Add(byte(i), append([]byte{0}, ops...))
		for _, off := range []uint16{4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104} {
			f.Add(byte(i), change(0, off, 2, 5, 0))
			f.Add(byte(i), change(0, off, 3, 6, 0))
		}
		for where := byte(4); where <= 8; where++ {
			for how := byte(3); how <= 7; how++ {
				f.Add(byte(i), change(where, 0, 3, how, uint64(where)+uint64(how)))
				f.Add(byte(i), change(where, 1, 1, how, uint64(how)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, seed byte, script []byte) {
		d := seeds[int(seed)%len(seeds)].Clone()
		script = mutate(d, script)
		fuzzImage(t, d, script)
	})
}

// FuzzBytes opens arbitrary bytes.
func FuzzBytes(f *testing.F) {
	for _, d := range fuzzSeeds(f) {
		size, _ := d.Size()
		b := make([]byte, min(size, 3<<10)) // short, or the fuzzer only minimises
		d.ReadAt(b, 0)
		f.Add(b)
		f.Add(b[:512])
	}
	f.Add([]byte{})
	f.Add([]byte("QFI\xfb"))
	f.Fuzz(func(t *testing.T, b []byte) {
		d := storagetest.NewDisk()
		if _, err := d.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		fuzzImage(t, d, []byte{0, 0, 0, 4, 0, 2, 0, 0, 34, 0, 7, 0, 0, 0, 0})
	})
}

// fuzzImage opens what is in d read-only and checks it, then opens it for
// writing and uses it.
func fuzzImage(t *testing.T, d *storagetest.Disk, script []byte) {
	t.Helper()
	mc, err := cache.New(cache.Options{Bytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := mc.Close(); err != nil {
			t.Errorf("close the cache: %v", err)
		}
	}()
	clean, _ := fuzzCheck(t, d.Clone(), mc)
	d.SetCapacity(d.Allocated() + 16<<20)
	im, err := qcow2.Open(t.Context(), d, qcow2.Options{Cache: mc})
	if err != nil {
		return
	}
	useErr := fuzzOps(t.Context(), im, script)
	closeErr := im.Close()
	if clean && useErr == nil && closeErr == nil {
		d.Reopen()
		// Refcounts beyond the old end of the file may have come to light as leaks.
		if _, sound := fuzzCheck(t, d, mc); !sound {
			t.Error("the image was clean, and is corrupt after use")
		}
	}
}

// fuzzCheck opens d read-only and reports whether Check finds it clean, and
// whether it finds it without corruption.
func fuzzCheck(t *testing.T, d *storagetest.Disk, mc *cache.Cache) (clean, sound bool) {
	t.Helper()
	d.ResetCounts()
	im, err := qcow2.Open(t.Context(), d, qcow2.Options{ReadOnly: true, Cache: mc})
	if err != nil {
		return false, false
	}
	defer im.Close()
	if n := im.Size(); n > 0 {
		im.ReadAt(make([]byte, min(n, 64<<10)), 0)
	}
	r, err := im.Check(t.Context(), qcow2.CheckOptions{})
	if d.Count(storagetest.OpChange) != 0 {
		t.Error("a read-only open wrote to the file")
	}
	return err == nil && r.Clean(), err == nil && r.Corruptions+r.CheckErrors == 0
}
