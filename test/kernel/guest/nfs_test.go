//go:build kernelguest

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// An nfsServer is the kernel's, which exports a directory to this machine. What user space has to say of
// clients and exports is written to the kernel's caches here: there is no mountd.
type nfsServer struct {
	t      *testing.T
	export string
}

// mountNFS starts a server and returns it with the directory that has its export, an XFS, over NFS 4.2.
func mountNFS(t *testing.T) (*nfsServer, string) {
	t.Helper()
	run(t, "ip", "link", "set", "lo", "up")
	s := &nfsServer{t: t, export: t.TempDir()}
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 512<<20); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", disk)
	loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", disk))
	t.Cleanup(func() { run(t, "losetup", "--detach", loop) })
	mount(t, loop, s.export, "xfs", "")
	mount(t, "nfsd", "/proc/fs/nfsd", "nfsd", "")
	// What a client needs to get its locks back from the next server is kept there.
	if err := os.MkdirAll("/var/lib/nfs/v4recovery", 0o755); err != nil {
		t.Fatal(err)
	}
	s.tell("/proc/fs/nfsd/versions", "-3 +4 +4.1 +4.2")
	s.start()
	t.Cleanup(s.stop)
	s.endGrace()
	dir := t.TempDir()
	mount(t, "127.0.0.1:/", dir, "nfs4", "vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1,proto=tcp,sec=sys,hard")
	return s, dir
}

// mount mounts a filesystem until the end of the test.
func mount(t *testing.T, source, dir, fs, data string) {
	t.Helper()
	if err := unix.Mount(source, dir, fs, 0, data); err != nil {
		t.Fatalf("mount %s: %v", fs, err)
	}
	t.Cleanup(func() { // a server lets go of its export some time after its end
		wait(t, fs+" to be unused", func() bool { return unix.Unmount(dir, 0) == nil })
	})
}

// tell writes a line to a file of the kernel's.
func (s *nfsServer) tell(path, line string) {
	s.t.Helper()
	if err := os.WriteFile(path, []byte(line+"\n"), 0); err != nil {
		s.t.Fatalf("%q: %v", line, err)
	}
}

func (s *nfsServer) start() {
	s.t.Helper()
	const (
		never = "2147483647"
		flags = "9216" // NFSEXP_FSID | NFSEXP_NOSUBTREECHECK, not ROOTSQUASH
	)
	// client address, then client and path, then client and type and value of the root's file system ID
	s.tell("/proc/net/rpc/auth.unix.ip/channel", "nfsd 127.0.0.1 "+never+" local")
	s.tell("/proc/net/rpc/nfsd.export/channel", "local "+s.export+" "+never+" "+flags+" 65534 65534 0")
	s.tell("/proc/net/rpc/nfsd.fh/channel", `local 1 \x00000000 `+never+" "+s.export)
	s.tell("/proc/fs/nfsd/threads", "4")
}

func (s *nfsServer) stop() {
	s.t.Helper()
	s.tell("/proc/fs/nfsd/threads", "0")
}

// endGrace ends the time in which a server gives nobody new locks, but clients theirs of the server before.
func (s *nfsServer) endGrace() {
	s.t.Helper()
	s.tell("/proc/fs/nfsd/v4_end_grace", "Y")
}

// allocated is what the image of v takes on the server.
func (s *nfsServer) allocated(v *volume) int64 {
	s.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(s.export, "volumes", v.id, "disk.qcow2"), &st); err != nil {
		s.t.Fatal(err)
	}
	return st.Blocks * 512
}
