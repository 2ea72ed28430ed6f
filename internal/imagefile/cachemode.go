package imagefile

import "csi-qcow2/qcow2"

// A CacheMode is one of the tools' cache modes:
//
//	Mode          Host page cache  Each write is durable  Flush
//	writeback     used             no                     syncs
//	none          bypassed         no                     syncs
//	writethrough  used             yes                    syncs
//	directsync    bypassed         yes                    syncs
//	unsafe        used             no                     does nothing
type CacheMode string

// The values of CacheMode; "" is writeback.
const (
	CacheWriteback    CacheMode = "writeback"
	CacheNone         CacheMode = "none"
	CacheWritethrough CacheMode = "writethrough"
	CacheDirectsync   CacheMode = "directsync"
	CacheUnsafe       CacheMode = "unsafe"
)

// ParseCacheMode returns the mode that s names, as QEMU's -t and --cache do.
func ParseCacheMode(s string) (CacheMode, bool) {
	switch m := CacheMode(s); m {
	case CacheWriteback, CacheNone, CacheWritethrough, CacheDirectsync, CacheUnsafe:
		return m, true
	case "off":
		return CacheNone, true
	}
	return "", false
}

func (m CacheMode) direct() bool      { return m == CacheNone || m == CacheDirectsync }
func (m CacheMode) syncsWrites() bool { return m == CacheWritethrough || m == CacheDirectsync }

// A syncImage is an image whose changes of content are durable before they return; what
// else an image can do is durable anyway.
type syncImage struct {
	*qcow2.Image
	sync syncDisk
}

func (d syncImage) WriteAt(p []byte, off int64) (int, error) { return d.sync.WriteAt(p, off) }

func (d syncImage) WriteZeroes(off, n int64, unmap bool) error {
	return d.sync.WriteZeroes(off, n, unmap)
}

func (d syncImage) Discard(off, n int64) error { return d.sync.Discard(off, n) }

// WriteCompressed is that of the image.
func (d syncImage) WriteCompressed(p []byte, off int64) error {
	if err := d.Image.WriteCompressed(p, off); err != nil {
		return err
	}
	return d.Flush()
}

// synced returns disk with each change made durable before it returns.
func synced(disk qcow2.Disk) qcow2.Disk {
	if im, ok := disk.(*qcow2.Image); ok {
		return syncImage{im, syncDisk{im}}
	}
	return syncDisk{disk}
}

// A syncDisk makes each change durable before it returns.
type syncDisk struct{ qcow2.Disk }

func (d syncDisk) WriteAt(p []byte, off int64) (int, error) {
	n, err := d.Disk.WriteAt(p, off)
	if err != nil {
		return n, err
	}
	return n, d.Flush()
}

func (d syncDisk) WriteZeroes(off, n int64, unmap bool) error {
	if err := d.Disk.WriteZeroes(off, n, unmap); err != nil {
		return err
	}
	return d.Flush()
}

func (d syncDisk) Discard(off, n int64) error {
	if err := d.Disk.Discard(off, n); err != nil {
		return err
	}
	return d.Flush()
}
