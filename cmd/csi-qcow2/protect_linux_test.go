package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestTaskFlags(t *testing.T) {
	for _, c := range []struct {
		stat string
		want uint64
		ok   bool
	}{
		{"4242 (csi-qcow2) S 1 4242 4242 0 -1 1573184 1 0", 1573184, true},
		{"1 (a) b) c) R 1 2 3 4 5 1572864 0", flusherFlags, true},
		{"1 (x) S 1 2", 0, false},
		{"", 0, false},
		{"1 (x) S 1 2 3 4 5 many", 0, false},
	} {
		if got, err := taskFlags(c.stat); got != c.want || (err == nil) != c.ok {
			t.Errorf("%q: %d, %v; want %d", c.stat, got, err, c.want)
		}
	}
}

func TestHeapLimit(t *testing.T) {
	for _, c := range []struct{ most, reserved, want int64 }{
		{1 << 30, 64 << 20, 1<<30/8*7 - 64<<20},
		{1 << 40, 64 << 20, maxHeapLimit},
		{64 << 20, 64 << 20, minHeapLimit},
		{0, 0, minHeapLimit},
	} {
		if got := heapLimit(c.most, c.reserved); got != c.want {
			t.Errorf("heapLimit(%d, %d) = %d, want %d", c.most, c.reserved, got, c.want)
		}
	}
}

// TestGroupMax looks for the limit where containers have it.
func TestGroupMax(t *testing.T) {
	for _, c := range []struct {
		name, groups string
		files        map[string]string
		want         int64
		limited      bool
	}{
		{"own namespace", "0::/\n", map[string]string{"memory.max": "1073741824\n"}, 1 << 30, true},
		{"privileged, below the host's root", "0::/kubepods/pod1/c1\n",
			map[string]string{"kubepods/memory.max": "8589934592\n", "kubepods/pod1/memory.max": "max\n", "kubepods/pod1/c1/memory.max": "1073741824\n"}, 1 << 30, true},
		{"only the pod is limited", "0::/kubepods/pod1/c1\n",
			map[string]string{"kubepods/pod1/memory.max": "2147483648\n", "kubepods/pod1/c1/memory.max": "max\n"}, 2 << 30, true},
		{"outside of the namespace", "0::/../c2\n", map[string]string{"memory.max": "1073741824\n"}, 1 << 30, true},
		{"version 1", "5:devices:/pod1\n4:cpu,memory:/pod1\n0::/pod1\n",
			map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/pod1/memory.limit_in_bytes": "1073741824\n"}, 1 << 30, true},
		{"version 1, the path is not seen", "4:memory:/kubepods/pod1\n",
			map[string]string{"memory/memory.limit_in_bytes": "1073741824\n"}, 1 << 30, true},
		{"no limit", "0::/a\n", map[string]string{"a/memory.max": "max\n"}, 0, false},
		{"no groups", "", nil, 0, false},
	} {
		root := t.TempDir()
		for name, text := range c.files {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, limited := groupMax(root, c.groups); got != c.want || limited != c.limited {
			t.Errorf("%s: %d, %v; want %d, %v", c.name, got, limited, c.want, c.limited)
		}
	}
}
