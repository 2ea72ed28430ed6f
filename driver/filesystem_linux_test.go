package driver

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestNewExt4IsZeroed: the kernel writes the empty inode tables of a new ext4, in the background, unless
// they are marked as zeroed; they are marked where they are zero.
func TestNewExt4IsZeroed(t *testing.T) {
	for _, zeroed := range []bool{true, false} {
		device := filepath.Join(t.TempDir(), "device")
		if err := os.WriteFile(device, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(device, 1<<30); err != nil {
			t.Fatal(err)
		}
		if err := NewHost().Format(t.Context(), fsExt4, device, zeroed); err != nil {
			t.Fatalf("%v (install e2fsprogs)", err)
		}
		out, err := exec.Command("dumpe2fs", device).Output()
		if err != nil {
			t.Fatalf("dumpe2fs: %v (install e2fsprogs)", err)
		}
		groups := len(regexp.MustCompile(`(?m)^Group \d+:`).FindAll(out, -1))
		marked := len(regexp.MustCompile(`ITABLE_ZEROED`).FindAll(out, -1))
		want := 0
		if zeroed {
			want = groups
		}
		if groups == 0 || marked != want {
			t.Errorf("zeroed %t: %d of %d inode tables are marked, want %d", zeroed, marked, groups, want)
		}
		if err := NewHost().Check(t.Context(), fsExt4, device); err != nil {
			t.Error(err)
		}
	}
}
