package storagetest

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// memoryRoom is how many bytes must be free in memory for a test to use it.
const memoryRoom = 1 << 30

// MemoryDir returns a new directory, in memory where there is room: tests that
// kill processes, not machines, would spend most of their time on syncs. A
// container's /dev/shm is too small; there it is on the disk.
func MemoryDir(tb testing.TB) string {
	tb.Helper()
	const shm = "/dev/shm"
	var st unix.Statfs_t
	if err := unix.Statfs(shm, &st); err != nil || st.Type != unix.TMPFS_MAGIC || st.Bavail*uint64(st.Bsize) < memoryRoom {
		return tb.TempDir()
	}
	dir, err := os.MkdirTemp(shm, "csi-qcow2-test-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
