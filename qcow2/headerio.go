package qcow2

import (
	"encoding/binary"
	"fmt"
)

// writeHeader overwrites a part of the header and makes it durable. The part
// lies inside one 512-byte sector, so that a power loss leaves the old or the
// new one: these writes are the commit points of the engine.
func (im *Image) writeHeader(off int64, part []byte) error {
	im.hdrMu.Lock()
	defer im.hdrMu.Unlock()
	if _, err := im.f.WriteAt(part, off); err != nil {
		return im.fail(fmt.Errorf("qcow2: write the header: %w", err))
	}
	if err := im.f.Datasync(); err != nil {
		return im.fail(fmt.Errorf("qcow2: sync the header: %w", err))
	}
	return nil
}

// setIncompatible sets or clears an incompatible feature bit in the header, durably.
func (im *Image) setIncompatible(bit uint64, on bool) error {
	if im.version < 3 {
		return nil // version 2 has no feature bits
	}
	im.hdrMu.Lock()
	if on {
		im.hdr.incompatible |= bit
	} else {
		im.hdr.incompatible &^= bit
	}
	var field [8]byte
	binary.BigEndian.PutUint64(field[:], im.hdr.incompatible)
	im.hdrMu.Unlock()
	return im.writeHeader(hdrOffIncompatible, field[:])
}

// fail makes the image failed: every later change returns the first error (P6).
func (im *Image) fail(err error) error {
	im.handle.Fail(err)
	return err
}

// failed returns the error that made the image failed, wrapped in ErrFailed.
func (im *Image) failed() error {
	if err := im.handle.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrFailed, err)
	}
	return nil
}

// Failed returns why the image is failed, matching ErrFailed, or nil: a write or
// sync of metadata went wrong, and the image must be closed, reopened and verified.
func (im *Image) Failed() error { return im.failed() }

// writable returns nil if the image can be changed.
func (im *Image) writable() error {
	switch {
	case im.closed.Load():
		return ErrClosed
	case im.opts.ReadOnly:
		return ErrReadOnly
	}
	return im.failed()
}
