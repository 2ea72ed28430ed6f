package volume

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
)

// victimDir is set in the process that TestRecoverAfterKill kills.
const victimDir = "CSI_QCOW2_TEST_VICTIM"

func recoverPaths(dir string) (pool, arena string) {
	return filepath.Join(dir, "pool"), filepath.Join(dir, "arena")
}

func recoverData() []byte { return bytes.Repeat([]byte("acknowledged"), 1<<16) }

const recoverOff = 12345

// TestRecoverVictim is not a test of its own: it is the process that is killed.
func TestRecoverVictim(t *testing.T) {
	dir := os.Getenv(victimDir)
	if dir == "" {
		return
	}
	poolDir, arena := recoverPaths(dir)
	tables, err := cache.New(cache.Options{Bytes: 1 << 20, Path: arena})
	if err != nil {
		t.Fatal(err)
	}
	pool, err := Open(t.Context(), poolDir, Options{Cache: tables})
	if err != nil {
		t.Fatal(err)
	}
	v, err := pool.Create(t.Context(), CreateRequest{Name: "pvc-1", Size: SizeRange{Required: 64 << 20}})
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
	fmt.Printf("ready %s\n", v.ID)
	select {} // until it is killed
}

// What a killed process wrote and never flushed is there for the next one: the
// data in the image file, the tables in the arena. Recover brings them together (P1).
func TestRecoverAfterKill(t *testing.T) {
	dir := t.TempDir()
	poolDir, arena := recoverPaths(dir)
	if err := os.Mkdir(poolDir, 0o700); err != nil {
		t.Fatal(err)
	}
	victim := exec.Command(os.Args[0], "-test.run=^TestRecoverVictim$")
	victim.Env = append(os.Environ(), victimDir+"="+dir)
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
	id, ok := strings.CutPrefix(strings.TrimSpace(line), "ready ")
	if err != nil || !ok {
		t.Fatalf("the victim said %q: %v", line, err)
	}
	if st, err := os.Stat(filepath.Join(poolDir, volumeDir(id), diskName)); err != nil || st.Size() == 0 {
		t.Fatalf("the victim's image: %v", err)
	}

	tables, err := cache.New(cache.Options{Bytes: 1 << 20, Path: arena})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(tables.Unclaimed()); n != 1 {
		t.Fatalf("%d images wait in the arena, want 1", n)
	}
	next, err := Open(t.Context(), poolDir, Options{Cache: tables})
	if err != nil {
		t.Fatal(err)
	}
	next.Recover(t.Context())
	if u := tables.Unclaimed(); len(u) != 0 {
		t.Errorf("after Recover: %v", u)
	}
	qemutest.Check(t, filepath.Join(poolDir, volumeDir(id), diskName))
	d, err := next.Open(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(recoverData()))
	if _, err := d.Image.ReadAt(got, recoverOff); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, recoverData()) {
		t.Error("an acknowledged write is lost")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := next.Close(); err != nil {
		t.Fatal(err)
	}
	if err := tables.Close(); err != nil {
		t.Fatal(err)
	}
}
