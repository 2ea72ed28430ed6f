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
