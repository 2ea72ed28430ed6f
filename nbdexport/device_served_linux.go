package nbdexport

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/durable"
)

// served remembers, for a later process, when each nbd device was served last. The kernel does not tell
// whether it has failed requests since, for want of a server; the time does.
//
// The record in the run-dir, kind "csi-qcow2 served devices", version 1:
//
//	bootID   of the kernel; times of another boot mean nothing
//	devices  by backend identifier:
//	  at       CLOCK_MONOTONIC, ns: the device was served then
//	  timeout  ns: how long requests wait for a server
type served struct {
	dir *durable.Dir

	mu  sync.Mutex // held over the write of the record, a file of some KiB on a tmpfs
	rec servedRecord
}

type servedRecord struct {
	BootID  string                `json:"bootID"`
	Devices map[string]lastServed `json:"devices"`
}

type lastServed struct {
	At      int64 `json:"at"`
	Timeout int64 `json:"timeout"`
}

const (
	servedName    = "devices.json"
	servedKind    = "csi-qcow2 served devices"
	servedVersion = 1
)

// openServed reads what a predecessor has remembered. A record that is damaged, or of another boot, says
// nothing about any device.
func openServed(dir *durable.Dir) (*served, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	boot := strings.TrimSpace(string(b))
	s := &served{dir: dir}
	err = durable.ReadRecord(dir, servedName, servedKind, servedVersion, &s.rec)
	if err != nil && !errors.Is(err, durable.ErrDamaged) && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err != nil || s.rec.BootID != boot || s.rec.Devices == nil {
		s.rec = servedRecord{BootID: boot, Devices: make(map[string]lastServed)}
	}
	return s, nil
}

// monotonic is the time since boot that counts for the kernel's timers.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("clock_gettime: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// left returns how long requests for the device still wait for a server at least: 0 when some may have
// failed, or when nothing is known.
func (s *served) left(backend string) (time.Duration, error) {
	now, err := monotonic()
	if err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d, known := s.rec.Devices[backend]
	if !known {
		return 0, nil
	}
	return max(0, time.Duration(d.At+d.Timeout)-now), nil
}

// note remembers that devices are served now.
func (s *served) note(timeout time.Duration, backends ...string) error {
	now, err := monotonic()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range backends {
		s.rec.Devices[b] = lastServed{At: int64(now), Timeout: int64(timeout)}
	}
	return s.writeLocked()
}

// forget drops a device that is gone.
func (s *served) forget(backend string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.rec.Devices[backend]; !known {
		return nil
	}
	delete(s.rec.Devices, backend)
	return s.writeLocked()
}

func (s *served) writeLocked() error {
	return durable.WriteRecord(s.dir, servedName, servedKind, servedVersion, s.rec)
}
