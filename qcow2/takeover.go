package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"csi-qcow2/cache"
)

// Taking over: an image with an ID may have been open in a process that was
// killed, and then the cache has what that process had not written yet. Open
// decides what becomes of it:
//
//	left in the cache    the file          Open
//	nothing              any               goes on with the file
//	dirty tables         stamped           writes them back
//	dirty tables         not stamped       drops them: somebody else has written the image since
//	that it had failed   stamped           opens it as failed: reads see the tables that were
//	                                       left, changes and Flush return ErrFailed
//	  and tables lost    stamped           ErrFailed; what was left waits on
//
// What was dropped is a power loss: the image is checked as after Options.Unclean.

// The stamp is an autoclear bit, set while an opener that can be taken over has
// the image open. Whoever opens the image for writing and does not know the bit
// must clear it (qcow2 "Header", autoclear_features), and QEMU does; so does Open. As
// long as it is there, the predecessor was the last who wrote.
//
// It is not synced: it vouches for an arena, and neither survives a power loss.
// Version 2 has no feature bits: there nobody must write the image in between.
const autoclearStamp = uint64(1) << 63

// errPredecessorFailed is why an image is failed from the start.
var errPredecessorFailed = errors.New("a write or sync had failed in the process that had the image open, which was then killed; close the image and open it again to go on with what is durable")

// stamped reports whether nobody has written the image since a predecessor.
func (im *Image) stamped() bool {
	return im.version < 3 || im.hdr.autoclear&autoclearStamp != 0
}

// claimLeft decides by the table above about what a predecessor left. The image
// is failed then, or what is dirty in the cache can be written back.
func (im *Image) claimLeft() error {
	marked, whole := im.handle.Marked()
	switch {
	case !marked && im.handle.Adopted() == 0:
		return nil
	case !im.stamped():
		im.opts.Unclean = true
		return errors.Join(im.handle.Discard(), im.openHandle())
	case marked && !whole:
		return fmt.Errorf("%w: %w", ErrFailed, errPredecessorFailed)
	case marked:
		im.handle.Fail(errPredecessorFailed)
	}
	return nil
}

// setStamp sets or clears the stamp, and clears all other autoclear bits, because
// this package keeps none of the structures that those vouch for.
func (im *Image) setStamp(on bool) error {
	want := uint64(0)
	if on && im.opts.ID != [16]byte{} && im.version >= 3 {
		want = autoclearStamp
	}
	had := im.hdr.autoclear
	if had == want {
		return nil
	}
	im.hdr.autoclear = want
	var field [8]byte
	binary.BigEndian.PutUint64(field[:], want)
	if had&^autoclearStamp != 0 {
		return im.writeHeader(hdrOffAutoclear, field[:]) // before the first change
	}
	if _, err := im.f.WriteAt(field[:], hdrOffAutoclear); err != nil {
		return im.fail(fmt.Errorf("qcow2: write the header: %w", err))
	}
	return nil
}

// A cachedFile is the image file as the tables that are dirty in the cache change it.
type cachedFile struct {
	File
	handle     *cache.Handle
	sliceBytes int64
}

// ReadAt is that of File; what lies beyond the end of the file can be in the cache.
func (c cachedFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.File.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return n, err
	}
	clear(p[n:])
	table := make([]byte, c.sliceBytes)
	for at := off / c.sliceBytes * c.sliceBytes; at < off+int64(len(p)); at += c.sliceBytes {
		t, ok := c.handle.TryGet(classL1, at) // the class of a cached table is its own
		if !ok {
			continue
		}
		for i := range len(table) / entryBytes {
			binary.BigEndian.PutUint64(table[i*entryBytes:], t.Load(i))
		}
		t.Unpin()
		from := max(at, off)
		n = max(n, int(from-off)+copy(p[from-off:], table[from-at:]))
	}
	if n == len(p) {
		err = nil
	}
	return n, err
}
