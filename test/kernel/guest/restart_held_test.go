//go:build kernelguest

package guest

import (
	"testing"
	"time"
)

// TestRestartHeld kills the process over devices of the other kind, loop over FUSE, on this kernel, which is older
// than FUSE's own way to send requests again. A holder keeps them.
func TestRestartHeld(t *testing.T) {
	const ends = 3 // the last one in order
	a := newAgent(t, "--device", "fuse")
	ext4 := a.create("ext4", "ext4", 128<<20, "")
	ext4.mount()
	clone := a.create("clone", "ext4", 128<<20, ext4.snapshot("base"))
	clone.mount()
	xfs := a.create("xfs", "xfs", 320<<20, "")
	xfs.mount()
	all := []*volume{ext4, clone, xfs}
	w := &workers{t: t}
	defer w.stop()
	pulses := w.loadAll(all)
	var p pauses
	for n := range ends {
		p.undisturbed(a, pulses)
		begin := time.Now()
		if n == ends-1 {
			a.terminate()
		} else {
			a.kill()
		}
		a.start()
		a.restored(all)
		restart := time.Since(begin)
		pause := p.add(a, pulses, restart)
		t.Logf("end %d: restarted after %d ms, pause of %d ms", n+1, restart.Milliseconds(), pause.Milliseconds())
	}
	p.judge(t, time.Second)
	w.stop()
	for _, v := range all {
		v.unmount()
	}
	for _, v := range []*volume{clone, ext4, xfs} {
		v.checkAndDelete()
	}
}
