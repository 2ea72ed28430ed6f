package freezer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/aside"
)

// victimEnv makes the test program a process that freezes what it names and waits.
const victimEnv = "FREEZER_TEST_VICTIM"

func TestMain(m *testing.M) {
	for _, main := range []func() (int, bool){Main, aside.Main} {
		if status, child := main(); child {
			os.Exit(status)
		}
	}
	if what := os.Getenv(victimEnv); what != "" {
		path, device, _ := strings.Cut(what, " ")
		number, err := strconv.ParseUint(device, 10, 64)
		if err == nil {
			_, err = Freeze(context.Background(), path, number, time.Hour, "")
		}
		fmt.Println(err)
		select {} // until it is killed
	}
	os.Exit(m.Run())
}

// deadline bounds every wait of these tests.
const deadline = 5 * time.Minute

// newMount returns where a new filesystem of the type is mounted, and its device number.
func newMount(t *testing.T, fstype string) (string, uint64) {
	t.Helper()
	base := t.TempDir()
	image, dir := filepath.Join(base, "disk"), filepath.Join(base, "mnt")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 512<<20); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs." + fstype, "-q", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s\nthis test needs root, loop devices, e2fsprogs and xfsprogs (hack/deps.sh)", args, err, out)
		}
	}
	device := deviceOf(t, dir)
	t.Cleanup(func() {
		_ = ThawLeft(context.Background(), dir, device, "") // the test's own has ended
		err := unix.Unmount(dir, 0)
		// A freezer that was killed may be on its way out still.
		for end := time.Now().Add(deadline); errors.Is(err, unix.EBUSY) && time.Now().Before(end); err = unix.Unmount(dir, 0) {
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir, device
}

func deviceOf(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Dev
}

// write starts a write to the filesystem; the channel says when it is through.
func write(dir string) <-chan error {
	done := make(chan error, 1)
	go func() { done <- os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600) }()
	return done
}

func wantWritten(t *testing.T, done <-chan error) {
	t.Helper()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(deadline):
		t.Fatalf("no write after %s: the filesystem is still frozen", deadline)
	}
}

// wantFrozen checks that the kernel says so.
func wantFrozen(t *testing.T, dir string, device uint64, want bool) {
	t.Helper()
	f, err := Freeze(t.Context(), dir, device, time.Hour, "")
	if got := errors.Is(err, ErrFrozen); got != want {
		t.Fatalf("frozen: got %v (%v), want %v", got, err, want)
	}
	if err == nil {
		if err := f.Thaw(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFreeze(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			dir, device := newMount(t, fstype)
			f, err := Freeze(t.Context(), dir, device, time.Hour, "")
			if err != nil {
				t.Fatal(err)
			}
			done := write(dir)
			wantFrozen(t, dir, device, true)
			select {
			case err := <-done:
				t.Fatalf("a write went through while frozen: %v", err)
			default:
			}
			if err := f.Thaw(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantWritten(t, done)
			wantFrozen(t, dir, device, false)
		})
	}
}

// Whatever ends the time between, the filesystem is thawed.
func TestThawedByItself(t *testing.T) {
	dir, device := newMount(t, "ext4")

	f, err := Freeze(t.Context(), dir, device, time.Millisecond, "")
	if err != nil {
		t.Fatal(err)
	}
	wantWritten(t, write(dir))
	if err := f.Thaw(t.Context()); !errors.Is(err, ErrExpired) {
		t.Errorf("the limit has passed: got %v, want ErrExpired", err)
	}

	if f, err = Freeze(t.Context(), dir, device, time.Hour, ""); err != nil {
		t.Fatal(err)
	}
	if err := ThawLeft(t.Context(), dir, device, ""); err != nil {
		t.Fatal(err)
	}
	if err := f.Thaw(t.Context()); !errors.Is(err, ErrExpired) {
		t.Errorf("somebody else has thawed it: got %v, want ErrExpired", err)
	}
	if err := ThawLeft(t.Context(), dir, device, ""); err != nil {
		t.Errorf("what is not frozen: %v", err)
	}
}

// startVictim starts a process that has frozen dir when it returns.
func startVictim(t *testing.T, dir string, device uint64) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d", victimEnv, dir, device))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Fatalf("victim: %q, %v", line, err)
	}
	return cmd
}

func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
}

// The filesystem of a process that is killed while it is frozen is thawed.
func TestThawedWhenParentIsKilled(t *testing.T) {
	dir, device := newMount(t, "ext4")
	victim := startVictim(t, dir, device)
	done := write(dir)
	wantFrozen(t, dir, device, true)
	kill(t, victim)
	wantWritten(t, done)
}

// childOf returns the only child of a process.
func childOf(t *testing.T, pid int) int {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // any thread may have started it
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if os.IsNotExist(err) || errors.Is(err, unix.ESRCH) {
			continue // a thread that has ended since
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(b))...)
	}
	if len(all) != 1 {
		t.Fatalf("children of %d: got %q, want one", pid, all)
	}
	child, err := strconv.Atoi(all[0])
	if err != nil {
		t.Fatal(err)
	}
	return child
}

// A container ends with all its processes: then the successor thaws.
func TestThawLeft(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			dir, device := newMount(t, fstype)
			victim := startVictim(t, dir, device)
			// Stopped, the freezer cannot see the end of its parent.
			freezer := childOf(t, victim.Process.Pid)
			if err := unix.Kill(freezer, unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			defer unix.Kill(freezer, unix.SIGKILL)
			kill(t, victim)
			done := write(dir)
			wantFrozen(t, dir, device, true)
			if err := ThawLeft(t.Context(), dir, device, ""); err != nil {
				t.Fatal(err)
			}
			wantWritten(t, done)
		})
	}
}

// ThawLeft looks again when the kernel has done with a freezer: what that freezes at last is thawed, too.
func TestThawLeftWaitsForTheFreezer(t *testing.T) {
	dir, device := newMount(t, "ext4")
	lock := filepath.Join(t.TempDir(), "lock")
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	freezer, err := os.Open(lock) // stands for one that is inside FIFREEZE
	if err != nil {
		t.Fatal(err)
	}
	defer freezer.Close()
	if err := unix.Flock(int(freezer.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(freezer.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- ThawLeft(t.Context(), dir, device, lock) }() // ends when the lock is free
	blocked := fmt.Sprintf(":%d 0 EOF", st.Ino)
	for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(strings.Split(string(locks), "\n"), func(line string) bool {
			return strings.Contains(line, "-> FLOCK") && strings.HasSuffix(line, blocked)
		}) {
			break
		}
		if time.Now().After(end) || len(done) > 0 {
			t.Fatal("nobody waits for the freezer")
		}
	}
	f, err := openMount(dir, device)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(fsfreeze(f, fiFreeze), f.Close()); err != nil {
		t.Fatal(err)
	}
	freezer.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	wantFrozen(t, dir, device, false)
}

// The lock is the freezer's for as long as that lives.
func TestFreezerKeepsTheLock(t *testing.T) {
	dir, device := newMount(t, "ext4")
	lock := filepath.Join(t.TempDir(), "lock")
	if err := os.WriteFile(lock, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Freeze(t.Context(), dir, device, time.Hour, lock)
	if err != nil {
		t.Fatal(err)
	}
	other, err := os.Open(lock)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.Flock(int(other.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("the lock while it is frozen: %v, want EWOULDBLOCK", err)
	}
	if err := f.Thaw(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(other.Fd()), unix.LOCK_SH); err != nil { // waits for the end of the freezer
		t.Error(err)
	}
}

func TestFreezeRefusals(t *testing.T) {
	dir, device := newMount(t, "ext4")
	if _, err := Freeze(t.Context(), dir, device+1, time.Hour, ""); err == nil || !strings.Contains(err.Error(), "device") {
		t.Errorf("another device: got %v", err)
	}
	if _, err := Freeze(t.Context(), filepath.Join(dir, "none"), device, time.Hour, ""); err == nil {
		t.Error("no directory: got nil")
	}
	if err := ThawLeft(t.Context(), dir, device+1, ""); err == nil {
		t.Error("thaw another device: got nil")
	}
	wantFrozen(t, dir, device, false)
}
