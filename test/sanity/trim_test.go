package sanity

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestTrim deletes files of a mounted filesystem and trims it: the host file
// gives their space back, of those that a snapshot holds when the snapshot goes.
func TestTrim(t *testing.T) {
	const bytes = 32 << 20
	p, k := startNode(t)
	id := k.useNew("trimmed", "ext4")
	target := k.target("trimmed")
	content := make([]byte, bytes)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content) // never fails
	used := func() int64 {
		t.Helper()
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(volumes(t, p)[0], "disk.qcow2"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	trim := func(name string) {
		t.Helper()
		if err := os.Remove(filepath.Join(target, name)); err != nil {
			t.Fatal(err)
		}
		for _, command := range [][]string{{"sync", "-f", target}, {"fstrim", target}} {
			if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%q: %v\n%s", command, err, out)
			}
		}
	}
	given := func(from int64) func() bool {
		return func() bool { return from-used() > bytes*9/10 }
	}

	writeFile(t, target+"/held", content)
	snap := k.snapshot("snap", id)
	writeFile(t, target+"/own", content)
	full := used()
	if full < 2*bytes {
		t.Fatalf("two files of %d bytes take %d on the host", bytes, full)
	}
	trim("own")
	p.wait("the space of the file that no snapshot has", given(full))
	one := used()
	trim("held")
	if now := used(); one-now > bytes/2 {
		t.Errorf("%d bytes of %d came back although a snapshot has them", one-now, bytes)
	}
	k.deleteSnapshot(snap)
	p.wait("the space of the file that the snapshot had", given(one))
	k.dispose("trimmed", id)
	k.finish()
}
