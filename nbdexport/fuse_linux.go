package nbdexport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	fuseFSName  = "csi-qcow2" // the mount's source, and its type after "fuse."
	fuseNodeID  = 2           // of the one file; the root is 1
	fuseMaxIO   = 1 << 20     // bytes of one READ or WRITE
	fuseBlkSize = 4096        // what STATFS says: the loop driver takes it as its discard granularity

	// fuseBackground bounds the direct I/O requests that the kernel has under way in one mount: a
	// loop device asks for up to 128 at once. fuseInflightBytes bounds the memory
	// for those with data, whose buffers are one fuseMaxIO each.
	fuseBackground    = 128
	fuseInflightBytes = 48 << 20
)

// fuseMount serves one Backend as the only file of a FUSE mount.
//
// The file is opened for direct I/O only, and attributes and names are never cached, so the
// kernel keeps no state that would have to be written back through FUSE: what the loop device asks for
// reaches the backend, one FUSE request each.
//
// The mount is made with mount(2), not fusermount, on a descriptor with O_CLOEXEC: a child
// that inherited it (mkfs, say) would keep the connection of a killed process alive, with
// nobody answering, where the kernel otherwise fails its requests at once.
type fuseMount struct {
	fuse.RawFileSystem // everything not defined here: ENOSYS

	backend  Backend
	readOnly bool
	discard  bool
	dir      string // mount point
	name     string // of the file
	size     atomic.Int64

	server *fuse.Server
	done   chan struct{} // closed when the connection has ended and no request is being served
}

// mountFUSE mounts b below the existing directory dir as a file called name, and serves it.
func mountFUSE(dir, name string, b Backend, o DeviceOptions) (*fuseMount, error) {
	m := &fuseMount{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		backend:       b,
		readOnly:      o.ReadOnly,
		discard:       o.Discard,
		dir:           dir,
		name:          name,
		done:          make(chan struct{}),
	}
	m.size.Store(b.Size())
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", fd, fuseMaxIO)
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME)
	if err := unix.Mount(fuseFSName, dir, "fuse."+fuseFSName, flags, opts); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("mount fuse on %q: %w", dir, err)
	}
	// The library takes a mounted descriptor by this name, and owns it from here on.
	m.server, err = fuse.NewServer(m, fmt.Sprintf("/dev/fd/%d", fd), &fuse.MountOptions{
		Name:                    fuseFSName,
		MaxWrite:                fuseMaxIO,
		MaxBackground:           fuseBackground,
		CongestionThreshold:     fuseBackground,
		MaxInflightRequestBytes: fuseInflightBytes,
		ExtraCapabilities:       fuse.CAP_ASYNC_DIO,
		DisabledCapabilities:    fuse.CAP_READDIRPLUS | fuse.CAP_NO_OPEN_SUPPORT | fuse.CAP_PASSTHROUGH,
		DisableXAttrs:           true,
		DisableSplice:           true, // reads go straight into the reply's buffer
		PanicHandler:            func(v any) fuse.Status { panic(v) },
		Logger:                  klog.NewStandardLogger("INFO"),
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve fuse on %q: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH))
	}
	go m.serve() // ends when the mount is gone or its connection is aborted
	return m, nil
}

func (m *fuseMount) serve() {
	defer close(m.done)
	m.server.Serve()
}

// path is the file that stands for the backend.
func (m *fuseMount) path() string { return filepath.Join(m.dir, m.name) }

// dead reports whether nobody serves the mount any more.
func (m *fuseMount) dead() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// grow makes the file size bytes long in the kernel's eyes.
func (m *fuseMount) grow(size int64) error {
	m.size.Store(size)
	// The kernel learns a size from GETATTR, and asks because attributes are never cached. The raw
	// call does not tie the file to the runtime's poller, which would wait for our own answer.
	var st unix.Stat_t
	if err := ignoringEINTR(func() error { return unix.Stat(m.path(), &st) }); err != nil {
		return fmt.Errorf("stat %q: %w", m.path(), err)
	}
	if st.Size != size {
		return fmt.Errorf("stat %q: size %d, want %d", m.path(), st.Size, size)
	}
	return nil
}

// unmount removes the mount and returns when the last request has been answered. Nothing may depend
// on the file any more: see unmountDir.
func (m *fuseMount) unmount() error {
	if err := unmountDir(m.dir); err != nil {
		return err
	}
	<-m.done
	return nil
}

// unmountDir unmounts the FUSE mount on dir. When somebody looks at it (stands in the directory,
// has the file open) the kernel refuses; then the mount leaves the tree all the same, and its
// connection ends at once: what they do next fails. Nothing being mounted there, or no such
// directory, is success.
func unmountDir(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE|unix.MNT_DETACH)
	}
	if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &os.PathError{Op: "unmount", Path: dir, Err: err}
}

// ignoringEINTR calls f again for as long as a signal interrupts it: the runtime's preemption is one.
func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// String names the file system in the library's messages.
func (m *fuseMount) String() string { return fuseFSName }

// Lookup is sent for every path walk through the mount.
func (m *fuseMount) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	if h.NodeId != fuse.FUSE_ROOT_ID || name != m.name {
		return fuse.ENOENT
	}
	out.NodeId = fuseNodeID
	m.attr(fuseNodeID, &out.Attr)
	return fuse.OK
}

// GetAttr is sent for every stat, and by the loop driver to learn the size.
func (m *fuseMount) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	m.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

func (m *fuseMount) attr(node uint64, a *fuse.Attr) {
	*a = fuse.Attr{Ino: node, Nlink: 1, Blksize: fuseBlkSize}
	switch {
	case node == fuse.FUSE_ROOT_ID:
		a.Mode = unix.S_IFDIR | 0o500
		a.Nlink = 2
	case m.readOnly:
		a.Mode = unix.S_IFREG | 0o400
		a.Size = uint64(m.size.Load())
	default:
		a.Mode = unix.S_IFREG | 0o600
		a.Size = uint64(m.size.Load())
	}
}

// SetAttr refuses truncation and the like: the size is the backend's.
func (m *fuseMount) SetAttr(_ <-chan struct{}, _ *fuse.SetAttrIn, _ *fuse.AttrOut) fuse.Status {
	return fuse.EPERM
}

// Open is sent by whoever opens the file: the loop device's maker, once.
func (m *fuseMount) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if m.readOnly && in.Flags&unix.O_ACCMODE != unix.O_RDONLY {
		return fuse.EROFS
	}
	out.OpenFlags = fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES
	return fuse.OK
}

// OpenDir lets people list the mount.
func (m *fuseMount) OpenDir(_ <-chan struct{}, _ *fuse.OpenIn, _ *fuse.OpenOut) fuse.Status {
	return fuse.OK
}

// ReadDir lists the one file.
func (m *fuseMount) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	if in.Offset == 0 {
		out.AddDirEntry(fuse.DirEntry{Name: m.name, Mode: unix.S_IFREG, Ino: fuseNodeID, Off: 1})
	}
	return fuse.OK
}

// StatFs is sent by df, and by the loop driver to learn the granularity of discards.
func (m *fuseMount) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.Bsize = fuseBlkSize
	out.Frsize = fuseBlkSize
	out.Blocks = uint64(m.size.Load()) / fuseBlkSize
	out.NameLen = 255
	return fuse.OK
}

// Read is sent for every read of the device. It reads into the reply's own buffer.
func (m *fuseMount) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	buf = buf[:m.clip(in.Offset, uint64(len(buf)))]
	if len(buf) == 0 {
		return fuse.ReadResultData(buf), fuse.OK
	}
	if _, err := m.backend.ReadAt(buf, int64(in.Offset)); err != nil {
		return nil, fuseStatus(err)
	}
	return fuse.ReadResultData(buf), fuse.OK
}

// Write is sent for every write of the device. data is the request's own buffer, aligned to 4096 bytes.
func (m *fuseMount) Write(_ <-chan struct{}, in *fuse.WriteIn, data []byte) (uint32, fuse.Status) {
	if status := m.writable(in.Offset, uint64(len(data))); status != fuse.OK {
		return 0, status
	}
	if _, err := m.backend.WriteAt(data, int64(in.Offset)); err != nil {
		return 0, fuseStatus(err)
	}
	return uint32(len(data)), fuse.OK
}

// Fallocate is sent for discards and for writes of zeroes: the loop driver makes PUNCH_HOLE of
// both when the zeroes may be unmapped. So a hole must read as zeroes, which Backend.Discard
// does not promise; it is a WriteZeroes that may unmap. Where discards are not wanted the hole is
// refused, and the kernel writes the zeroes out instead.
func (m *fuseMount) Fallocate(_ <-chan struct{}, in *fuse.FallocateIn) fuse.Status {
	if status := m.writable(in.Offset, in.Length); status != fuse.OK {
		return status
	}
	hole := in.Mode&^unix.FALLOC_FL_KEEP_SIZE == unix.FALLOC_FL_PUNCH_HOLE
	zero := in.Mode&^unix.FALLOC_FL_KEEP_SIZE == unix.FALLOC_FL_ZERO_RANGE
	if !zero && !(hole && m.discard) {
		return fuse.Status(unix.EOPNOTSUPP)
	}
	if in.Length == 0 {
		return fuse.OK
	}
	return fuseStatus(m.backend.WriteZeroes(int64(in.Offset), int64(in.Length), hole))
}

// Fsync is sent for every flush of the device.
func (m *fuseMount) Fsync(_ <-chan struct{}, _ *fuse.FsyncIn) fuse.Status {
	return fuseStatus(m.backend.Flush())
}

// Flush is sent when a descriptor of the file is closed. It is no request to flush.
func (m *fuseMount) Flush(_ <-chan struct{}, _ *fuse.FlushIn) fuse.Status { return fuse.OK }

// clip returns how many of the n bytes at off are inside the file.
func (m *fuseMount) clip(off, n uint64) uint64 {
	size := uint64(m.size.Load())
	if off >= size {
		return 0
	}
	return min(n, size-off)
}

// writable checks a change of the n bytes at off.
func (m *fuseMount) writable(off, n uint64) fuse.Status {
	size := uint64(m.size.Load())
	switch {
	case m.readOnly:
		return fuse.EROFS
	case off > size || n > size-off:
		return fuse.Status(unix.EFBIG)
	}
	return fuse.OK
}

// fuseStatus is the errno of a backend's error, EIO when it has none that the kernel's block layer
// tells apart.
func fuseStatus(err error) fuse.Status {
	var errno syscall.Errno
	switch {
	case err == nil:
		return fuse.OK
	case errors.As(err, &errno):
		switch errno {
		case unix.ENOSPC, unix.EDQUOT:
			return fuse.Status(unix.ENOSPC)
		case unix.EROFS, unix.EPERM, unix.ENOMEM, unix.EOPNOTSUPP, unix.EINVAL:
			return fuse.Status(errno)
		}
	}
	return fuse.EIO
}
