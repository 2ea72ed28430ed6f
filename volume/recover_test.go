package volume

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
)

// victimDir and victimVolumes are set in the process that TestRecoverAfterKill kills.
const (
	victimDir     = "CSI_QCOW2_TEST_VICTIM"
	victimVolumes = "CSI_QCOW2_TEST_VICTIM_VOLUMES"
)

func recoverPaths(dir string) (pool, arena string) {
	return filepath.Join(dir, "pool"), filepath.Join(dir, "arena")
}

func recoverData() []byte { return bytes.Repeat([]byte("acknowledged"), 1<<16) }

const (
	recoverOff   = 12345
	recoverCache = 64 << 20
)

// TestRecoverVictim is not a test of its own: it is the process that is killed.
func TestRecoverVictim(t *testing.T) {
	dir := os.Getenv(victimDir)
	if dir == "" {
		return
	}
	poolDir, arena := recoverPaths(dir)
	volumes, err := strconv.Atoi(os.Getenv(victimVolumes))
	if err != nil {
		t.Fatal(err)
	}
	tables, err := cache.New(cache.Options{Bytes: recoverCache, Path: arena})
	if err != nil {
		t.Fatal(err)
	}
	pool, err := Open(t.Context(), poolDir, Options{Cache: tables})
	if err != nil {
		t.Fatal(err)
	}
	for i := range volumes {
		v, err := pool.Create(t.Context(), CreateRequest{Name: fmt.Sprint("pvc-", i), Size: SizeRange{Required: 64 << 20}})
		if err != nil {
			t.Fatal(err)
		}
		d, err := pool.Open(t.Context(), v.ID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Image.WriteAt(recoverData(), recoverOff); err != nil {
			t.Fatal(err)
		}
	}
	fmt.Println("ready")
	select {} // until it is killed
}

// What a killed process wrote and never flushed is there for the next one: the
// data in the image files, the tables in the arena. Recover brings them together (P1).
func TestRecoverAfterKill(t *testing.T) {
	for _, volumes := range []int{1, 100} {
		t.Run(fmt.Sprint(volumes, " volumes"), func(t *testing.T) { recoverAfterKill(t, volumes) })
	}
}

func recoverAfterKill(t *testing.T, volumes int) {
	dir := storagetest.MemoryDir(t)
	poolDir, arena := recoverPaths(dir)
	if err := os.Mkdir(poolDir, 0o700); err != nil {
		t.Fatal(err)
	}
	victim := exec.Command(os.Args[0], "-test.run=^TestRecoverVictim$")
	victim.Env = append(os.Environ(), victimDir+"="+dir, fmt.Sprint(victimVolumes, "=", volumes))
	victim.Stderr = os.Stderr
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait() // its error is the signal
	if err != nil || line != "ready\n" {
		t.Fatalf("the victim said %q: %v", line, err)
	}

	begin := time.Now()
	tables, err := cache.New(cache.Options{Bytes: recoverCache, Path: arena})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(tables.Unclaimed()); n != volumes {
		t.Fatalf("%d images wait in the arena, want %d", n, volumes)
	}
	next, err := Open(t.Context(), poolDir, Options{Cache: tables})
	if err != nil {
		t.Fatal(err)
	}
	next.Recover(t.Context())
	t.Logf("takeover of %d open images: %v", volumes, time.Since(begin).Round(time.Millisecond))
	if u := tables.Unclaimed(); len(u) != 0 {
		t.Errorf("after Recover: %v", u)
	}
	ids := next.IDs()
	if len(ids) != volumes {
		t.Errorf("%d volumes, want %d", len(ids), volumes)
	}
	for _, id := range ids {
		if problem, err := next.Health(id); problem != nil || err != nil {
			t.Errorf("volume %s: %v, %v", id, problem, err)
		}
		d, err := next.Open(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(recoverData()))
		if _, err := d.Image.ReadAt(got, recoverOff); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, recoverData()) {
			t.Errorf("volume %s: an acknowledged write is lost", id)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	qemutest.Check(t, filepath.Join(poolDir, volumeDir(ids[0]), diskName))
	if err := errors.Join(next.Close(), tables.Close()); err != nil {
		t.Fatal(err)
	}
}
