package storagetest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// Sizes of the model.
const (
	PageSize   = 4096 // unit of the page cache: written back whole, at any time
	SectorSize = 512  // unit of the medium: never torn
)

// errNegative is returned for a negative offset or length, as the kernel's EINVAL.
var errNegative = fmt.Errorf("storagetest: negative offset or length: %w", syscall.EINVAL)

// A page is the content of PageSize bytes. Frozen pages are shared between
// disks and states and are copied before they are changed.
type page struct {
	b      [PageSize]byte
	frozen bool
	sum    atomic.Uint64 // hash of b: 0 unknown, 1 all zeroes
}

// freeze freezes p. One that is frozen may be another disk's too, and is not written.
func (p *page) freeze() {
	if !p.frozen {
		p.frozen = true
	}
}

// A Disk is a simulated host file. The zero value is not usable: see NewDisk.
type Disk struct {
	mu     sync.Mutex
	pages  map[int64]*page // guarded by mu; an absent or nil page is all zeroes
	size   int64           // guarded by mu; bytes
	closed bool            // guarded by mu

	// durable holds the durable version of each page that was changed since
	// the last Datasync, and durableSize the durable size.
	durable     map[int64]*page // guarded by mu
	durableSize int64           // guarded by mu

	log    *Log     // guarded by mu; nil unless Record was called
	tail   bool     // the log starts anew at every sync
	faults []*Fault // guarded by mu
	counts counts   // guarded by mu
	direct int      // guarded by mu; alignment that requests must have, 0 for none

	capacity int64 // guarded by mu; bytes of pages that fit, 0 for no limit

	hook atomic.Pointer[func(Op, int64)] // see SetHook
}

// NewDisk returns an empty file.
func NewDisk() *Disk {
	return &Disk{pages: make(map[int64]*page), durable: make(map[int64]*page)}
}

// LoadDisk returns a disk with the content of the host file at path. All of it is durable.
func LoadDisk(path string) (*Disk, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	d := NewDisk()
	buf := make([]byte, 256*PageSize)
	for off := int64(0); ; {
		n, err := io.ReadFull(f, buf)
		for i := 0; i < n; i += PageSize {
			p := new(page)
			copy(p.b[:], buf[i:min(n, i+PageSize)])
			if p.b != ([PageSize]byte{}) {
				d.pages[(off+int64(i))/PageSize] = p
			}
		}
		off += int64(n)
		d.size = off
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return nil, err
		}
	}
	d.durableSize = d.size
	return d, nil
}

// Dump writes the content to a sparse host file at path, for tools that need one.
func (d *Disk) Dump(path string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	err = f.Truncate(d.size)
	for i, p := range d.pages {
		off := i * PageSize
		if p == nil || off >= d.size || err != nil {
			continue
		}
		_, err = f.WriteAt(p.b[:min(PageSize, d.size-off)], off)
	}
	return errors.Join(err, f.Close())
}

// Clone returns an independent open disk of the same content, all of it
// durable, without log, faults or counts.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return &Disk{pages: d.freeze(), size: d.size, durable: make(map[int64]*page), durableSize: d.size}
}

// Fork is Clone for a disk that records its tail: what is not durable in d is
// not durable in the copy either, which records its tail too.
func (d *Disk) Fork() *Disk {
	c := d.Clone()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, p := range d.durable {
		if p != nil {
			p.freeze()
		}
	}
	c.durable, c.durableSize = maps.Clone(d.durable), d.durableSize
	c.log, c.tail = &Log{base: d.log.base, size: d.log.size, events: slices.Clone(d.log.events)}, true
	return c
}

// freeze returns a copy of the page map, whose pages it freezes. d.mu is held.
func (d *Disk) freeze() map[int64]*page {
	m := make(map[int64]*page, len(d.pages))
	for i, p := range d.pages {
		if p != nil {
			p.freeze()
			m[i] = p
		}
	}
	return m
}

// SetDirect makes reads and writes whose memory, offset or length is not a
// multiple of align fail with EINVAL, as a file opened with O_DIRECT does. 0
// turns it off.
func (d *Disk) SetDirect(align int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.direct = align
}

// SetHook makes reads, writes and syncs call f with their offset before they do
// anything; f may wait, and so hold a request back while others go on. nil
// means none.
func (d *Disk) SetHook(f func(op Op, off int64)) {
	if f == nil {
		d.hook.Store(nil)
		return
	}
	d.hook.Store(&f)
}

func (d *Disk) callHook(op Op, off int64) {
	if f := d.hook.Load(); f != nil {
		(*f)(op, off)
	}
}

// SetCapacity makes writes fail with ENOSPC that would need more than n bytes
// of pages, as on a full file system. 0 means no limit.
func (d *Disk) SetCapacity(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.capacity = n
}

// full returns ENOSPC when a write of n bytes at off does not fit. d.mu is held.
func (d *Disk) full(off int64, n int) error {
	if d.capacity == 0 || n == 0 {
		return nil
	}
	pages := int64(len(d.pages))
	for i := off / PageSize; i*PageSize < off+int64(n); i++ {
		if d.pages[i] == nil {
			pages++
		}
	}
	if pages > int64(len(d.pages)) && pages*PageSize > d.capacity {
		return syscall.ENOSPC
	}
	return nil
}

// ReadAt implements io.ReaderAt.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.callHook(OpRead, off)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.start(OpRead, off, p); err != nil {
		return 0, err
	}
	if off >= d.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), d.size-off))
	for done := 0; done < n; {
		i, in := (off+int64(done))/PageSize, int((off+int64(done))%PageSize)
		chunk := p[done:min(n, done+PageSize-in)]
		if pg := d.pages[i]; pg != nil {
			copy(chunk, pg.b[in:])
		} else {
			clear(chunk)
		}
		done += len(chunk)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt implements io.WriterAt.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	return d.write(OpWrite, off, p)
}

// WritevAt writes the buffers one after another at off.
func (d *Disk) WritevAt(bufs [][]byte, off int64) (int, error) {
	return d.write(OpWritev, off, bufs...)
}

func (d *Disk) write(op Op, off int64, bufs ...[]byte) (int, error) {
	d.callHook(op, off)
	d.mu.Lock()
	defer d.mu.Unlock()
	total := 0
	for _, b := range bufs {
		total += len(b)
	}
	err := d.start(op, off, bufs...)
	if err == nil {
		err = d.full(off, total)
	}
	var short *shortError
	if errors.As(err, &short) {
		// Whole sectors: a medium that fails does not tear them.
		total, err = int(max(0, (off+int64(total)/2)/SectorSize*SectorSize-off)), short.err
	} else if err != nil {
		return 0, err
	}
	data := make([]byte, 0, total)
	for _, b := range bufs {
		data = append(data, b[:min(len(b), total-len(data))]...)
	}
	d.change(Event{Op: op, Off: off, N: int64(total), Data: data})
	return total, err
}

// Datasync makes the content and the size of the file durable.
func (d *Disk) Datasync() error {
	d.callHook(OpSync, 0)
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.start(OpSync, 0)
	var drop *dropError
	if errors.As(err, &drop) {
		d.change(Event{Op: opDrop})
		return drop.err
	}
	if err != nil {
		return err
	}
	d.change(Event{Op: OpSync})
	return nil
}

// Truncate sets the file size; new bytes read as zeroes.
func (d *Disk) Truncate(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.start(OpTruncate, size); err != nil {
		return err
	}
	d.change(Event{Op: OpTruncate, N: size})
	return nil
}

// Size returns the file size in bytes.
func (d *Disk) Size() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.start(OpSize, 0); err != nil {
		return 0, err
	}
	return d.size, nil
}

// Punch makes [off, off+n) read as zeroes; it does not change the size.
func (d *Disk) Punch(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.start(OpPunch, min(off, n)); err != nil {
		return err
	}
	if n = min(n, d.size-off); n > 0 {
		d.change(Event{Op: OpPunch, Off: off, N: n})
	}
	return nil
}

// Allocate makes the file at least off+n bytes long.
func (d *Disk) Allocate(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.start(OpAllocate, min(off, n)); err != nil {
		return err
	}
	d.change(Event{Op: OpAllocate, Off: off, N: n})
	return nil
}

// Close implements io.Closer. The content stays: see Reopen.
func (d *Disk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.start(OpClose, 0); err != nil {
		return err
	}
	d.closed = true
	return nil
}

// Reopen makes a closed disk usable again: the next process opens the file.
func (d *Disk) Reopen() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = false
}

// Closed reports whether Close was called since the last Reopen.
func (d *Disk) Closed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// Allocated returns how many bytes of the file are in pages that are not holes.
func (d *Disk) Allocated() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.pages)) * PageSize
}

// start counts an operation, and returns why it must fail, if it must. d.mu is held.
func (d *Disk) start(op Op, off int64, bufs ...[]byte) error {
	if d.closed {
		return fs.ErrClosed
	}
	if off < 0 {
		return errNegative
	}
	n := 0
	for _, b := range bufs {
		n += len(b)
		if d.direct != 0 && len(b) > 0 && (uintptr(unsafe.Pointer(&b[0]))|uintptr(len(b)))%uintptr(d.direct) != 0 {
			return fmt.Errorf("storagetest: %v of %d bytes at %#x from unaligned memory: %w", op, len(b), off, syscall.EINVAL)
		}
	}
	if d.direct != 0 && op&(OpRead|OpWrite|OpWritev) != 0 && off%int64(d.direct) != 0 {
		return fmt.Errorf("storagetest: %v at unaligned offset %#x: %w", op, off, syscall.EINVAL)
	}
	d.counts.add(op, n)
	return d.fault(op)
}

// change applies e, which changes the file, and logs it. d.mu is held.
func (d *Disk) change(e Event) {
	if d.log != nil {
		d.log.events = append(d.log.events, e)
	}
	switch e.Op {
	case OpSync:
		clear(d.durable)
		d.durableSize = d.size
		if d.tail {
			d.startTail()
		}
	case opDrop:
		for i, p := range d.durable {
			d.setPage(i, p)
		}
		clear(d.durable)
		d.size = d.durableSize
	default:
		d.size = e.apply(d.size, d.pages, d.edit)
	}
}

// edit returns page i for changing, and keeps its durable version. d.mu is held.
func (d *Disk) edit(i int64) *page {
	p := d.pages[i]
	if _, ok := d.durable[i]; !ok {
		if p != nil {
			p.freeze()
		}
		d.durable[i] = p
	}
	switch {
	case p == nil:
		p = new(page)
	case p.frozen:
		p = &page{b: p.b}
	}
	p.sum.Store(0)
	d.pages[i] = p
	return p
}

func (d *Disk) setPage(i int64, p *page) {
	if p == nil {
		delete(d.pages, i)
		return
	}
	d.pages[i] = p
}

// Equal reports whether d and other have the same content and size.
func (d *Disk) Equal(other *Disk) bool { return d.sum() == other.sum() }

// sum returns the hash of the content that State.Sum is.
func (d *Disk) sum() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return newReplay(&Log{base: d.freeze(), size: d.size}).choose(0, "", 0, nil).Sum
}
