//go:build kernelguest

package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// arenaLayoutOffset is where the header of an arena file has its layout version.
const arenaLayoutOffset = 8

// TestRestartPlanned ends the process as an upgrade does, under load. Nothing is disconnected, nobody sees an
// error, and the next process may have another layout of the arena: it is left empty.
func TestRestartPlanned(t *testing.T) {
	a := newAgent(t)
	ext4 := a.create("ext4", "ext4", 128<<20, "")
	xfs := a.create("xfs", "xfs", 320<<20, "")
	w := &workers{t: t}
	defer w.stop()
	all := []*volume{xfs, ext4}
	for _, v := range all {
		v.mount()
	}
	pulses := w.loadAll(all)
	arena := filepath.Join(runDir, "arena")
	var p pauses
	for n := range 4 {
		p.undisturbed(a, pulses)
		begin := time.Now()
		a.terminate()
		ended := time.Now()
		if fi, err := os.Stat(arena); err != nil {
			t.Error(err)
		} else if fi.Size() != 0 {
			t.Errorf("the arena that is left has %d bytes, want none", fi.Size())
		}
		if left, _ := filepath.Glob("/sys/block/nbd*/backend"); len(left) != 2 {
			t.Errorf("devices after SIGTERM: %v, want 2", left)
		}
		a.start()
		a.restored([]*volume{ext4, xfs})
		restored := time.Now()
		pause := p.add(a, pulses, restored.Sub(begin))
		t.Logf("restart %d: ended in %d ms, next process ready after %d ms, pause of %d ms", n+1,
			ended.Sub(begin).Milliseconds(), restored.Sub(ended).Milliseconds(), pause.Milliseconds())
	}
	p.judge(t, time.Second)

	// A process that was killed leaves what another layout would misread: it is refused, and nothing is lost.
	a.kill()
	f, err := os.OpenFile(arena, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	version := make([]byte, 1)
	if _, err := f.ReadAt(version, arenaLayoutOffset); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{version[0] + 1}, arenaLayoutOffset); err != nil {
		t.Fatal(err)
	}
	a.start()
	wait(t, "a process that refuses the arena", func() bool { return !a.running() })
	if log, err := os.ReadFile(a.log()); err != nil || !strings.Contains(string(log), "another layout") || !strings.Contains(string(log), "SIGTERM") {
		t.Errorf("the refusal does not say why and what to do: %v", err)
	}
	if _, err := f.WriteAt(version, arenaLayoutOffset); err != nil {
		t.Fatal(err)
	}
	a.start()
	for _, one := range pulses {
		one.beaten(a)
	}
	w.stop()
	for _, v := range all {
		v.unmount()
		v.checkAndDelete()
	}
}
