package sanity

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// holderPID returns the process that holds for p, or 0.
func (p *process) holderPID() int {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: p.path("run/holder.sock"), Net: "unixpacket"})
	if err != nil {
		return 0
	}
	defer conn.Close()
	raw, err := conn.SyscallConn()
	if err != nil {
		p.t.Fatal(err)
	}
	pid := 0
	err = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if err != nil || pid == 0 {
		p.t.Fatalf("the holder has no process ID: %v", err)
	}
	return pid
}

// killHolder kills the process that holds for p, if there is one.
func (p *process) killHolder() {
	if pid := p.holderPID(); pid > 0 {
		syscall.Kill(pid, syscall.SIGKILL)
		p.wait("the end of the holder", func() bool { return p.holderPID() != pid }) // the next may be there already
	}
}

// A writer writes 4 KiB after 4 KiB to a file, past the page cache, until it is stopped.
type writer struct {
	written atomic.Int64  // blocks
	longest time.Duration // that one took, once done is closed
	err     error         // once done is closed
	done    chan struct{}
}

const writerBlocks = 256 // that it writes round and round

func startWriter(ctx context.Context, path string) *writer {
	w := &writer{done: make(chan struct{})}
	go func() { // ends with ctx
		defer close(w.done)
		w.err = w.run(ctx, path)
	}()
	return w
}

func (w *writer) run(ctx context.Context, path string) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_DIRECT, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	block, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(block)
	for n := int64(0); ctx.Err() == nil; n++ {
		copy(block, bytes.Repeat(fmt.Appendf(nil, "%015d\n", n), 4096/16))
		begin := time.Now()
		if _, err := f.WriteAt(block, n%writerBlocks*4096); err != nil {
			return fmt.Errorf("block %d: %w", n, err)
		}
		if n%64 == 0 {
			if err := f.Sync(); err != nil {
				return fmt.Errorf("sync after block %d: %w", n, err)
			}
		}
		w.longest = max(w.longest, time.Since(begin))
		w.written.Store(n + 1)
	}
	return nil
}

// check compares the file with what was written last to each block.
func (w *writer) check(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	n := w.written.Load()
	for i := max(0, n-writerBlocks); i < n; i++ {
		want := bytes.Repeat(fmt.Appendf(nil, "%015d\n", i), 4096/16)
		at := i % writerBlocks * 4096
		if int64(len(content)) < at+4096 || !bytes.Equal(content[at:at+4096], want) {
			return fmt.Errorf("block %d is not what was written last", i)
		}
	}
	return nil
}

// A kernelLog is what the kernel says from the moment that it was opened.
type kernelLog struct {
	t  *testing.T
	fd int
}

func openKernelLog(t *testing.T) kernelLog {
	t.Helper()
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		t.Fatal(err)
	}
	return kernelLog{t, fd}
}

// of returns the errors and warnings that name one of the devices, or a task of
// this test, which hangs then.
func (l kernelLog) of(devices []string) []string {
	l.t.Helper()
	ours := []string{"task fio:", `task sanity\.test:`}
	for _, device := range devices {
		ours = append(ours, `\b`+regexp.QuoteMeta(strings.TrimPrefix(device, "/dev/"))+`\b`)
	}
	named := regexp.MustCompile(strings.Join(ours, "|"))
	var lines []string
	b := make([]byte, 8192) // more than a record has
	for {
		n, err := unix.Read(l.fd, b)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return lines
		case errors.Is(err, unix.EPIPE):
			continue // others have said so much that a record is gone
		case err != nil:
			l.t.Fatal(err)
		}
		line := string(b[:n])
		var priority int
		if _, err := fmt.Sscanf(line, "%d,", &priority); err != nil {
			l.t.Fatalf("%q: %v", line, err)
		}
		const warning = 4
		if priority&7 <= warning && named.MatchString(line) {
			lines = append(lines, line)
		}
	}
}

// verify runs fio with a checksum in every block in dir until ctx ends.
func verify(ctx context.Context, dir string) error {
	for ctx.Err() == nil {
		out, err := exec.Command("fio", "--name=verify", "--directory="+dir, "--size=24m", "--rw=randwrite", "--bsrange=4k-128k",
			"--direct=1", "--ioengine=libaio", "--iodepth=16", "--fsync=32", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0").CombinedOutput()
		if err != nil {
			return fmt.Errorf("fio: %w\n%s", err, out)
		}
	}
	return nil
}

// TestKilledUnderLoad kills the process again and again while fio writes and
// verifies on several volumes, one of them a clone. Nobody sees an error.
func TestKilledUnderLoad(t *testing.T) {
	const kills = 20
	log := openKernelLog(t)
	p, k := startNode(t)
	fstypes := map[string]string{"ext4": "ext4", "xfs": "xfs", "clone": "ext4"}
	ids := make(map[string]string)
	for _, name := range []string{"ext4", "xfs"} {
		ids[name] = k.useNew(name, fstypes[name])
		writeFile(t, k.target(name)+"/f", []byte("before"))
	}
	ids["clone"] = k.create("clone", 512, fromVolume(ids["ext4"]), "ext4")
	k.use("clone", ids["clone"], "ext4")
	wantFile(t, k.target("clone")+"/f", []byte("before"))

	devices := p.loops()

	load, stop := context.WithCancel(context.Background())
	defer stop()
	var running sync.WaitGroup
	writers := make(map[string]*writer)
	failures := make(chan error, len(ids))
	for name := range ids {
		writers[name] = startWriter(load, k.target(name)+"/written")
		running.Go(func() { // ends with load
			if err := verify(load, k.target(name)); err != nil {
				failures <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	progress := func(what string) {
		t.Helper()
		before := make(map[string]int64)
		for name, w := range writers {
			before[name] = w.written.Load()
		}
		p.wait("writes "+what, func() bool {
			for name, w := range writers {
				select {
				case err := <-failures:
					t.Fatal(err)
				case <-w.done:
					t.Fatalf("%s: %v", name, w.err)
				default:
				}
				if w.written.Load() < before[name]+200 {
					return false
				}
			}
			return true
		})
	}
	for i := range kills {
		progress(fmt.Sprintf("before kill %d", i+1))
		if i%3 == 2 { // in the middle of calls, too
			go k.CreateSnapshot(k.rpc(), &csi.CreateSnapshotRequest{Name: fmt.Sprint("s", i), SourceVolumeId: ids["ext4"]})
		}
		if err := p.signal(syscall.SIGKILL); err == nil {
			t.Fatal("the process ended well after SIGKILL")
		}
		p.start()
	}
	progress("after the last kill")
	if err := p.signal(syscall.SIGTERM); err != nil {
		t.Fatalf("SIGTERM under load: %v", err)
	}
	p.start()
	progress("after SIGTERM")
	stop()
	k.conn.Close()
	k = newKubelet(p) // at once, where a broken connection tries again later and later
	running.Wait()
	select {
	case err := <-failures:
		t.Error(err)
	default:
	}
	var longest time.Duration
	for name, w := range writers {
		if <-w.done; w.err != nil {
			t.Errorf("%s: %v", name, w.err)
		}
		longest = max(longest, w.longest)
		if err := w.check(k.target(name) + "/written"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		k.unuse(name, ids[name])
		k.use(name, ids[name], fstypes[name]) // which checks the filesystem
		if err := w.check(k.target(name) + "/written"); err != nil {
			t.Errorf("%s, mounted again: %v", name, err)
		}
		wantFile(t, k.target(name)+"/f", []byte("before"))
		k.unuse(name, ids[name])
	}
	for _, line := range log.of(devices) {
		t.Errorf("kernel: %s", line)
	}
	t.Logf("%d kills and a SIGTERM; the longest that a write took was %s", kills, longest)
	for _, id := range k.snapshots() {
		k.deleteSnapshot(id)
	}
	k.deleteVolume(ids["clone"])
	k.deleteVolume(ids["xfs"])
	k.deleteVolume(ids["ext4"])
	k.finish()
}

// TestHolderKilled: a new holder is started, and what it holds survives a kill of the process.
func TestHolderKilled(t *testing.T) {
	p, k := startNode(t)
	id := k.useNew("v", "ext4")
	first := p.holderPID()
	if first == 0 {
		t.Fatal("there is no holder")
	}
	p.killHolder()
	p.wait("a new holder", func() bool { pid := p.holderPID(); return pid != 0 && pid != first })
	p.wait("good health", func() bool { return len(k.health(id)) == 0 })
	writeFile(t, k.target("v")+"/f", []byte("hello"))
	p.signal(syscall.SIGKILL)
	p.start()
	p.wait("the device", func() bool { return len(k.health(id)) == 0 })
	wantFile(t, k.target("v")+"/f", []byte("hello"))
	k.dispose("v", id)
	k.finish()
}

// health lists what is wrong with a volume, as text.
func (k *kubelet) health(id string) []string {
	k.p.t.Helper()
	var resp *csi.NodeGetVolumeHealthResponse
	k.must("health of "+id, func() (err error) {
		resp, err = k.NodeGetVolumeHealth(k.rpc(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
		return err
	})
	var all []string
	for _, e := range resp.GetVolumeHealth().GetHealthStatuses() {
		all = append(all, strings.Join([]string{e.GetStatus().String(), e.GetReason(), e.GetMessage()}, " "))
	}
	return all
}

// TestCacheLost: a device whose last writes are lost with the cache is not taken over, and nobody
// waits for it.
func TestCacheLost(t *testing.T) {
	p, k := startNode(t)
	id := k.useNew("v", "ext4")
	writeFile(t, k.target("v")+"/f", []byte("hello"))
	p.signal(syscall.SIGKILL)
	if err := os.Remove(p.path("run/arena")); err != nil {
		t.Fatal(err)
	}
	p.start()
	p.wait("the loss to show", func() bool {
		h := k.health(id)
		return len(h) == 1 && strings.Contains(h[0], "INACCESSIBLE DeviceLost")
	})
	if err := exec.Command("dd", "if="+k.target("v")+"/f", "of=/dev/null", "iflag=direct").Run(); err == nil {
		t.Error("a lost device can be read")
	}
	k.use("v", id, "ext4")
	wantFile(t, k.target("v")+"/f", []byte("hello"))
	k.dispose("v", id)
	k.finish()
}

// TestHolderAndProcessKilled: the devices are lost, the volumes say so, and staging them again repairs them.
func TestHolderAndProcessKilled(t *testing.T) {
	p, k := startNode(t)
	id := k.useNew("v", "ext4")
	writeFile(t, k.target("v")+"/f", []byte("hello"))
	p.signal(syscall.SIGKILL)
	p.killHolder()
	if err := os.WriteFile(filepath.Join(k.target("v"), "g"), nil, 0o600); !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.EROFS) {
		// The kernel may have taken the write into the page cache; a sync cannot be.
		if err := exec.Command("sync", "-f", k.target("v")).Run(); err == nil {
			t.Error("the filesystem works without a server")
		}
	}
	p.start()
	p.wait("the loss to show", func() bool {
		h := k.health(id)
		return len(h) == 1 && strings.Contains(h[0], "INACCESSIBLE DeviceLost")
	})
	k.use("v", id, "ext4")
	wantFile(t, k.target("v")+"/f", []byte("hello"))
	if h := k.health(id); len(h) != 0 {
		t.Errorf("health after the repair: %q", h)
	}
	k.dispose("v", id)
	k.finish()
}
