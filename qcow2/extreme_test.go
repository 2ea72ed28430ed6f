package qcow2

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"csi-qcow2/internal/storagetest"
)

// sparseImage returns an image that is checked at the end, whose host file is
// hostBytes long; the next cluster is allocated behind them.
func sparseImage(t *testing.T, clusterSize, hostBytes int64) *Image {
	t.Helper()
	d := storagetest.NewDisk()
	if err := Create(t.Context(), d, 1<<30, CreateOptions{ClusterSize: clusterSize}); err != nil {
		t.Fatal(err)
	}
	if err := d.Truncate(hostBytes); err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), d, Options{})
	if err != nil {
		t.Fatal(err)
	}
	im.allocator.low = im.allocator.lowEnd // as when all of the file is in use
	t.Cleanup(func() {
		if r, err := im.Check(context.Background(), CheckOptions{}); err != nil || !r.Clean() {
			t.Errorf("check: %+v, %v", r, err)
		}
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	return im
}

// TestCompressedBeyondItsOffsets writes compressed clusters where their entries,
// which have 49 bits for the offset with clusters of 2 MiB, cannot say so.
func TestCompressedBeyondItsOffsets(t *testing.T) {
	const cluster = 2 << 20
	im := sparseImage(t, cluster, 1<<49-2*cluster)
	want := make([]byte, cluster)
	for i := range int64(8) {
		clear(want)
		want[i] = byte(1 + i)
		if err := im.WriteCompressed(want, i*cluster); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, cluster)
		if _, err := im.ReadAt(got, i*cluster); err != nil || !bytes.Equal(got, want) {
			t.Errorf("cluster %d: other bytes (%v)", i, err)
		}
	}
}

// TestHostFileBeyondItsOffsets allocates in a file that is longer than 2^56 bytes,
// whose refcount table has a block for what lies there.
func TestHostFileBeyondItsOffsets(t *testing.T) {
	const cluster = 2 << 20
	im := sparseImage(t, cluster, 1<<57)
	a, g := &im.allocator, &im.geo
	table := slices.Clone(a.table())
	for beyond := g.hostCluster(maxHostOffset); ; beyond <<= 1 {
		i, _ := g.refblockIndex(beyond)
		if i >= len(table) {
			break
		}
		table[i] = table[0]
	}
	a.reftable.Store(&table)
	if _, err := im.WriteAt([]byte{1}, 0); !errors.Is(err, ErrTooLarge) {
		t.Errorf("WriteAt: %v, want ErrTooLarge", err)
	}
	a.low, a.lowEnd = 0, g.hostCluster(1<<30)
	if _, err := im.WriteAt([]byte{1}, 0); err != nil {
		t.Errorf("WriteAt with room below: %v", err)
	}
}

// TestRefcountTableGrowsToItsLimit grows a refcount table that is more than two
// thirds of the largest.
func TestRefcountTableGrowsToItsLimit(t *testing.T) {
	const most = maxReftableBytes / entryBytes
	im := sparseImage(t, 512, 1<<20)
	a, g := &im.allocator, &im.geo
	allocAt := func(table hostCluster) error {
		if err := im.returnAhead(); err != nil {
			t.Fatal(err)
		}
		a.freed, a.tail = nil, table<<g.refblockBits
		c, n, _, err := im.alloc(1)
		if err == nil {
			im.free(c, n)
		}
		return err
	}
	for _, table := range []hostCluster{most * 3 / 4, most - 100} {
		if err := allocAt(table); err != nil {
			t.Errorf("a cluster of refcount block %d: %v", table, err)
		}
	}
	if n := len(a.table()); n != most {
		t.Errorf("the refcount table has %d entries, want %d", n, most)
	}
	if err := allocAt(most); !errors.Is(err, ErrTooLarge) {
		t.Errorf("beyond the largest table: %v, want ErrTooLarge", err)
	}
}
