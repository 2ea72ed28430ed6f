package volume

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"csi-qcow2/cache"
)

// BenchmarkLinkedClone reads a flat volume and a linked clone of it in turns, so
// that both see the same machine, and reports the clone's share of the flat
// volume's speed. A clone of a clone costs no more than one more look at tables.
func BenchmarkLinkedClone(b *testing.B) {
	const size = 256 << 20
	c, err := cache.New(cache.Options{Bytes: 64 << 20})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	dir := b.TempDir()
	p, err := Open(b.Context(), dir, Options{Cache: c})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	flat, err := p.Create(b.Context(), CreateRequest{Name: "flat", Size: SizeRange{Required: size}, Params: DefaultParams()})
	if err != nil {
		b.Fatal(err)
	}
	disk, err := p.Open(b.Context(), flat.ID)
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for i := range buf {
		buf[i] = byte(i)
	}
	for off := int64(0); off < size; off += int64(len(buf)) {
		if _, err := disk.Image.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	volumes := map[string]string{"flat": flat.ID}
	source := flat.ID
	for _, name := range []string{"linked", "linked-twice"} {
		v, err := p.Create(b.Context(), CreateRequest{Name: name, Params: DefaultParams(), Source: Source{Volume: source}})
		if err != nil {
			b.Fatal(err)
		}
		volumes[name], source = v.ID, v.ID
	}
	if err := disk.Close(); err != nil {
		b.Fatal(err)
	}
	disks := make(map[string]*Disk)
	for name, id := range volumes {
		if disks[name], err = p.Open(b.Context(), id); err != nil {
			b.Fatal(err)
		}
		defer disks[name].Close()
	}
	const batch = 32 // reads of one volume before it is the other's turn
	for _, block := range []int{4096, 64 << 10, 1 << 20} {
		for _, name := range []string{"linked", "linked-twice"} {
			b.Run(fmt.Sprintf("%s/%d", name, block), func(b *testing.B) {
				r := rand.New(rand.NewPCG(1, 2))
				read := func(d *Disk) (took time.Duration) {
					begin := time.Now()
					for range batch {
						if _, err := d.Image.ReadAt(buf[:block], r.Int64N(size/int64(block))*int64(block)); err != nil {
							b.Fatal(err)
						}
					}
					return time.Since(begin)
				}
				var shares []float64
				b.ReportAllocs()
				for b.Loop() {
					shares = append(shares, float64(read(disks["flat"]))/float64(read(disks[name])))
				}
				slices.Sort(shares)
				b.ReportMetric(shares[len(shares)/2], "of-flat")
			})
		}
	}
}
