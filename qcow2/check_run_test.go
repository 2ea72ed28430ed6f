package qcow2_test

import (
	"context"
	"errors"
	"testing"

	"csi-qcow2/qcow2"
)

func TestCheckProgress(t *testing.T) {
	d := newDisk(t, 1<<20, qcow2.CreateOptions{ClusterSize: 512, Preallocation: qcow2.PreallocationMetadata})
	last, calls := 0.0, 0
	_, err := qcow2.CheckFile(t.Context(), d, qcow2.CheckOptions{Progress: func(done float64) {
		if done < last || done > 1 {
			t.Errorf("progress %g after %g", done, last)
		}
		last = done
		calls++
	}})
	if err != nil || last != 1 || calls < 10 {
		t.Errorf("%d calls, the last with %g, %v", calls, last, err)
	}
}

func TestCheckCancelled(t *testing.T) {
	d := newDisk(t, 1<<20, qcow2.CreateOptions{ClusterSize: 512, Preallocation: qcow2.PreallocationMetadata})
	ctx, cancel := context.WithCancel(t.Context())
	r, err := qcow2.CheckFile(ctx, d, qcow2.CheckOptions{RepairAll: true, Progress: func(float64) { cancel() }})
	if !errors.Is(err, context.Canceled) || r.Clean() {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestCheckDoesNotWrite: without a repair the file stays as it is, whatever is
// wrong with it.
func TestCheckDoesNotWrite(t *testing.T) {
	for name, poke := range pokes() {
		d := pokedDisk(t, poke)
		before := d.Clone()
		if _, err := qcow2.CheckFile(t.Context(), d, qcow2.CheckOptions{}); err != nil {
			t.Logf("%s: %v", name, err)
		}
		if !d.Equal(before) {
			t.Errorf("%s: the check has changed the file", name)
		}
	}
}
