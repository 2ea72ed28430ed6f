package main

import "testing"

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
