package demo

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A leftover is something of the kernel that belongs to a stage.
type leftover struct {
	kind string // "mount", "loop device", "nbd device" or "process"
	name string // mount point, device or process ID
	what string // for people
}

func (l leftover) String() string { return fmt.Sprintf("%s %s (%s)", l.kind, l.name, l.what) }

// leftovers asks the kernel what belongs to s, in the order in which force
// takes it away: the holder of FUSE connections and nbd devices, whose requests would wait for a dead agent and a
// umount for them; mounts, newest first; loop devices; processes.
func (s stage) leftovers() ([]leftover, error) {
	var all []leftover
	for _, find := range []func() ([]leftover, error){s.holders, s.nbds, s.mounts, s.loops, s.processes} {
		some, err := find()
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// owns reports whether path is s or below it.
func (s stage) owns(path string) bool { return within(string(s), path) }

// within reports whether path is dir or below it.
func within(dir, path string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// mounts returns the mounts at or below s, FUSE mounts too, newest first.
func (s stage) mounts() ([]leftover, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var mounts []leftover
	for line := range strings.Lines(string(text)) {
		// ID PARENT MAJOR:MINOR ROOT POINT OPTIONS… - TYPE SOURCE OPTIONS
		before, after, _ := strings.Cut(line, " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || len(tail) < 2 {
			continue
		}
		if point := unescape(fields[4]); s.owns(point) {
			mounts = append(mounts, leftover{"mount", point, tail[0] + " of " + tail[1]})
		}
	}
	slices.Reverse(mounts)
	return mounts, nil
}

// unescape undoes the \ooo of blanks and backslashes in mountinfo.
func unescape(path string) string {
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '\\' && i+3 < len(path) {
			if n, err := strconv.ParseUint(path[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(path[i])
	}
	return b.String()
}

// loops returns the loop devices on files of s, deleted files too.
func (s stage) loops() ([]leftover, error) {
	return devices("loop device", "/sys/block/loop*/loop/backing_file", s.owns)
}

// holders returns the process that keeps FUSE connections for the agent's
// successor. It ends by itself when the agent has, unless the agent was killed.
func (s stage) holders() ([]leftover, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(s.run(), "holder.sock"), Net: "unixpacket"})
	if err != nil {
		return nil, nil // nobody is there
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) {
		peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if peerErr != nil {
		return nil, peerErr
	}
	return []leftover{{"process", strconv.Itoa(int(peer.Pid)), "csi-qcow2 holder"}}, nil
}

// nbds returns the nbd devices whose backend is a volume of s.
func (s stage) nbds() ([]leftover, error) {
	return devices("nbd device", "/sys/block/nbd*/backend", func(backend string) bool {
		for _, id := range s.volumeIDs() {
			if strings.Contains(backend, id) {
				return true
			}
		}
		return false
	})
}

// devices returns the block devices whose sysfs file, one of those that match
// pattern, has a content that ours accepts.
func devices(kind, pattern string, ours func(content string) bool) ([]leftover, error) {
	files, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var found []leftover
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // detached since the listing
		}
		if content := strings.TrimSpace(string(text)); ours(content) {
			name := strings.Split(file, "/")[3] // /sys/block/NAME/…
			found = append(found, leftover{kind, "/dev/" + name, content})
		}
	}
	return found, nil
}

// volumeIDs returns the IDs of the volumes that s ever mounted.
func (s stage) volumeIDs() []string {
	var ids []string
	for _, dir := range []string{"staging", "pods"} {
		entries, _ := os.ReadDir(s.path(dir))
		for _, e := range entries {
			if !slices.Contains(ids, e.Name()) {
				ids = append(ids, e.Name())
			}
		}
	}
	pool, _ := os.ReadDir(s.path("pool", "volumes"))
	for _, e := range pool {
		if !slices.Contains(ids, e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids
}

// remove takes l away by force.
func (l leftover) remove() error {
	switch l.kind {
	case "mount":
		// Lazily: a dead agent's filesystem may not answer.
		return unix.Unmount(l.name, unix.MNT_DETACH)
	case "loop device":
		return ioctl(l.name, unix.LOOP_CLR_FD)
	case "nbd device":
		const nbdDisconnect = 0xab08 // linux/nbd.h; allowed on netlink's devices too
		return ioctl(l.name, nbdDisconnect)
	case "process":
		pid, err := strconv.Atoi(l.name)
		if err != nil {
			return err
		}
		return unix.Kill(pid, unix.SIGKILL)
	}
	return fmt.Errorf("%s: nobody knows how to remove it", l)
}

// ioctl makes the request, which has no argument, of a device.
func ioctl(device string, request uint) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}
