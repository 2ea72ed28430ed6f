package qcow2

import (
	"errors"
	"fmt"
	"io"
	"sync"
)

// readCompressed fills p with the content of the compressed cluster of entry e,
// from byte within of the cluster.
func (im *Image) readCompressed(e l2Entry, p []byte, within int64) error {
	g := &im.geo
	off, n := e.compressedRange(g)
	src := GetBuffer(int(n))
	defer PutBuffer(src)
	m, err := im.f.ReadAt(src, int64(off))
	if m < len(src) && err != io.EOF { // the last sector may lie beyond the end of the file
		return fmt.Errorf("qcow2: read compressed cluster at %#x: %w", uint64(off), err)
	}
	if m == 0 {
		return corruptf("compressed cluster", off, "it lies beyond the end of the file")
	}
	if within == 0 && int64(len(p)) == g.clusterSize {
		err = decompressCluster(im.hdr.compressionType, p, src[:m])
	} else {
		whole := GetBuffer(int(g.clusterSize))
		defer PutBuffer(whole)
		if err = decompressCluster(im.hdr.compressionType, whole, src[:m]); err == nil {
			copy(p, whole[within:])
		}
	}
	if err != nil {
		return corruptf("compressed cluster", off, "%v", err)
	}
	return nil
}

// packer places compressed clusters one behind the other, several in one host
// cluster: the refcount of a host cluster is the number of descriptors that touch it.
type packer struct {
	mu   sync.Mutex
	next HostOffset // guarded by mu; where the free rest of the last host cluster begins, 0 for none
}

// WriteCompressed stores one whole guest cluster compressed, or as WriteAt when it
// does not shrink, and where the host file is longer than the entries of
// compressed clusters can say. off must be a multiple of the cluster size, and p one
// cluster, or the shorter rest of the disk.
func (im *Image) WriteCompressed(p []byte, off int64) error {
	g := &im.geo
	size := im.size.Load()
	if g.inCluster(off) != 0 || int64(len(p)) != min(g.clusterSize, size-off) {
		return fmt.Errorf("%w: a compressed write must be one whole cluster, not %d bytes at %#x", ErrOutOfRange, len(p), off)
	}
	whole := p
	if int64(len(p)) < g.clusterSize {
		whole = GetBuffer(int(g.clusterSize))
		defer PutBuffer(whole)
		clear(whole[copy(whole, p):])
	}
	packed := GetBuffer(int(g.clusterSize))
	defer PutBuffer(packed)
	n, ok := compressCluster(im.hdr.compressionType, packed, whole)
	err := errCannotPack
	if ok && int64(n) < g.clusterSize {
		_, err = im.change(off, int64(len(p)), func() (int, error) { return 0, im.writePacked(packed[:n], off) })
	}
	if err == errCannotPack {
		_, err = im.WriteAt(p, off)
	}
	return err
}

// errCannotPack: a cluster must be stored as it is.
var errCannotPack = errors.New("")

func (im *Image) writePacked(data []byte, off int64) error {
	g := &im.geo
	c := g.guestCluster(GuestOffset(off))
	held := im.claims.acquire(im.claimKey(c), uint64(c), 1)
	defer im.claims.release(held)
	table, err := im.ensureL2(g.l1Index(c))
	if err != nil {
		return err
	}
	host, err := im.allocBytes(int64(len(data)))
	if err != nil {
		return err
	}
	entry := makeCompressed(g, host, int64(len(data)))
	if _, err := im.f.WriteAt(data, int64(host)); err != nil {
		im.releaseCluster(entry)
		return err
	}
	r := g.l2Run(table, c)
	var old [1]l2Entry
	if err := im.loadL2(r, old[:]); err != nil {
		im.releaseCluster(entry)
		return err
	}
	if err := im.storeL2(r, []l2Entry{entry}); err != nil {
		im.releaseCluster(entry)
		return err
	}
	im.releaseCluster(old[0])
	return nil
}

// allocBytes allocates n bytes, at most a cluster, for compressed data: behind
// the data of the last call if they fit there or the next cluster follows it.
func (im *Image) allocBytes(n int64) (HostOffset, error) {
	g, pk := &im.geo, &im.packer
	pk.mu.Lock()
	defer pk.mu.Unlock()
	if pk.next != 0 {
		at := pk.next
		c := g.hostCluster(at)
		if room := g.clusterSize - g.inCluster(int64(at)); room >= n {
			if err := im.addRefcounts(c, 1, 1); err == nil {
				pk.advance(g, at, n)
				return at, nil
			}
			// Its refcount is at the limit: begin a new cluster.
		}
	}
	c, _, _, err := im.alloc(1)
	if err != nil {
		return 0, err
	}
	if !g.packable(g.hostOffset(c)) {
		im.free(c, 1)
		return 0, errCannotPack
	}
	if pk.next != 0 && g.hostCluster(pk.next)+1 == c {
		at := pk.next
		if err := im.addRefcounts(c-1, 1, 1); err == nil {
			pk.advance(g, at, n)
			return at, nil
		}
	}
	at := g.hostOffset(c)
	pk.advance(g, at, n)
	return at, nil
}

// advance moves next behind n bytes at at. A cluster that is full is left: its
// refcount may fall to 0 and it be reused.
func (p *packer) advance(g *geometry, at HostOffset, n int64) {
	p.next = at + HostOffset(n)
	if g.inCluster(int64(p.next)) == 0 {
		p.next = 0
	}
}

// forget leaves the cluster of next if it is one of n clusters from first, of which
// the last reference is about to go. It reports whether that was so.
func (p *packer) forget(g *geometry, first hostCluster, n int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := g.hostCluster(p.next)
	if p.next == 0 || c < first || c >= first+hostCluster(n) {
		return false
	}
	p.next = 0
	return true
}
