package nbdtest

import (
	"context"
	"sync"
	"syscall"

	"csi-qcow2/nbdexport"
)

// memoryBlock is the unit in which a Memory knows holes.
const memoryBlock = 4096 // bytes

// A Memory is a Backend in memory that knows its holes. Its hooks let a test
// hold requests up or make them fail; they are set before it is used.
type Memory struct {
	// Before, if not nil, is called before each operation ("read", "write",
	// "zero", "discard", "flush", "status"); an error ends the operation.
	Before func(op string, off, n int64) error

	mu      sync.RWMutex
	data    []byte
	mapped  []bool // of each block: it has content; else it is a hole
	durable []byte // what a power loss would leave
}

var _ nbdexport.Backend = (*Memory)(nil)

// NewMemory returns a Memory of size bytes, all hole.
func NewMemory(size int64) *Memory {
	return &Memory{
		data:    make([]byte, size),
		durable: make([]byte, size),
		mapped:  make([]bool, (size+memoryBlock-1)/memoryBlock),
	}
}

func (m *Memory) before(op string, off, n int64) error {
	if m.Before == nil {
		return nil
	}
	return m.Before(op, off, n)
}

func (m *Memory) check(off, n int64) error {
	if off < 0 || n <= 0 || off+n > int64(len(m.data)) {
		return syscall.EINVAL
	}
	return nil
}

// ReadAt implements nbdexport.Backend.
func (m *Memory) ReadAt(p []byte, off int64) (int, error) {
	if err := m.before("read", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	return copy(p, m.data[off:]), nil
}

// WriteAt implements nbdexport.Backend.
func (m *Memory) WriteAt(p []byte, off int64) (int, error) {
	if err := m.before("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, int64(len(p))); err != nil {
		return 0, err
	}
	m.setMapped(off, int64(len(p)), true)
	return copy(m.data[off:], p), nil
}

// WriteZeroes implements nbdexport.Backend.
func (m *Memory) WriteZeroes(off, n int64, unmap bool) error {
	if err := m.before("zero", off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, n); err != nil {
		return err
	}
	clear(m.data[off : off+n])
	if unmap {
		m.unmap(off, n)
	} else {
		m.setMapped(off, n, true)
	}
	return nil
}

// Discard implements nbdexport.Backend.
func (m *Memory) Discard(off, n int64) error {
	if err := m.before("discard", off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check(off, n); err != nil {
		return err
	}
	m.unmap(off, n)
	return nil
}

// unmap makes holes of the whole blocks in [off, off+n). m.mu is held.
func (m *Memory) unmap(off, n int64) {
	first := (off + memoryBlock - 1) / memoryBlock * memoryBlock
	last := (off + n) / memoryBlock * memoryBlock
	if last > first {
		clear(m.data[first:last])
		m.setMapped(first, last-first, false)
	}
}

func (m *Memory) setMapped(off, n int64, mapped bool) {
	for b := off / memoryBlock; b <= (off+n-1)/memoryBlock; b++ {
		m.mapped[b] = mapped
	}
}

// Flush implements nbdexport.Backend.
func (m *Memory) Flush() error {
	if err := m.before("flush", 0, 0); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	copy(m.durable, m.data)
	return nil
}

// Durable returns the bytes of [off, off+n) that a power loss would leave.
func (m *Memory) Durable(off, n int64) []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.durable[off:off+n]...)
}

// BlockStatus implements nbdexport.Backend.
func (m *Memory) BlockStatus(_ context.Context, off, n int64) (nbdexport.Extent, error) {
	if err := m.before("status", off, n); err != nil {
		return nbdexport.Extent{}, err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check(off, n); err != nil {
		return nbdexport.Extent{}, err
	}
	mapped := m.mapped[off/memoryBlock]
	end := off
	for end < off+n && m.mapped[end/memoryBlock] == mapped {
		end = (end/memoryBlock + 1) * memoryBlock
	}
	e := nbdexport.Extent{Len: min(end, off+n) - off, Hole: !mapped, Zero: !mapped}
	if mapped {
		e.Depth = 1
	}
	return e, nil
}

// Size implements nbdexport.Backend.
func (m *Memory) Size() int64 { return int64(len(m.data)) }

// SparseReads implements nbdexport.SparseReader.
func (m *Memory) SparseReads() bool { return true }
