package nbdexport

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"
)

// pollerOn returns a poller that has found n short waits, its connection, and the
// client's end of that.
func pollerOn(t *testing.T, n int) (p *poller, here, there net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if there, err = net.Dial("unix", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if here, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { here.Close(); there.Close() })
	p = newPoller(here)
	p.limit = 1
	for range n {
		p.slept(10*time.Microsecond, 1)
	}
	return p, here, there
}

// TestPollerLearns checks when a wait is spent awake.
func TestPollerLearns(t *testing.T) {
	p, _, _ := pollerOn(t, pollAfter-1)
	if p.eager(1) {
		t.Error("awake before it was seen that the client is quick")
	}
	p.slept(10*time.Microsecond, 1)
	if !p.eager(1) {
		t.Error("asleep after waits that were all short")
	}
	p.slept(time.Millisecond, 1)
	if p.eager(1) {
		t.Error("awake after a long wait")
	}
	for range pollAfter {
		p.slept(10*time.Microsecond, pollRequests+1)
	}
	if p.eager(1) {
		t.Error("awake although requests gather")
	}
	for range pollAfter {
		p.slept(10*time.Microsecond, 1)
	}
	if !p.eager(pollRequests) || p.eager(pollRequests+1) {
		t.Error("awake for too many or too few requests")
	}
	for range pollPause {
		if p.eager(1) {
			t.Fatal("awake in a pause")
		}
		p.slept(10*time.Microsecond, 1)
	}
	asleep := 0
	for range 4*pollProbe + pollAfter {
		if !p.eager(1) {
			asleep++
		}
		p.score++
	}
	if asleep != pollAfter+4 {
		t.Errorf("%d waits asleep: want %d, and one of %d then", asleep, pollAfter, pollProbe)
	}
}

// TestPollerRead checks that a wait awake brings what arrives, and ends without.
func TestPollerRead(t *testing.T) {
	p, here, there := pollerOn(t, pollAfter)
	b := make([]byte, 8)
	if n, err := p.read(b); n != 0 || err != nil || p.score > 0 {
		t.Errorf("of a silent client: %d bytes, %v, score %d: want none and no more polling", n, err, p.score)
	}
	if _, err := there.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	if n, err := p.read(b); err != nil || string(b[:n]) != "request" {
		t.Errorf("got %q, %v: want what the client sent", b[:n], err)
	}
	if err := here.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := p.read(b); !os.IsTimeout(err) {
		t.Errorf("after the deadline: %v: want a timeout", err)
	}
	here.SetReadDeadline(time.Time{})
	there.Close()
	if n, err := p.read(b); n != 0 || err != nil {
		t.Errorf("after the end: %d, %v: want it left to the next read", n, err)
	}
	if _, err := here.Read(b); err != io.EOF {
		t.Errorf("the next read: %v: want EOF", err)
	}
}

// TestPollersLeaveCPUs checks that there are never more of them awake than may be,
// and none where there is one CPU only.
func TestPollersLeaveCPUs(t *testing.T) {
	p, _, there := pollerOn(t, pollAfter)
	if _, err := there.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	before := awake.Add(1) // another connection's
	if n, err := p.read(make([]byte, 8)); n != 0 || err != nil {
		t.Errorf("with another awake: %d, %v: want nothing read", n, err)
	}
	if got := awake.Add(-1); got != before-1 {
		t.Errorf("%d awake: want %d", got, before-1)
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	one, _ := net.Pipe()
	defer one.Close()
	if p := newPoller(one); p.limit != 0 || p.eager(1) {
		t.Errorf("limit %d on one CPU, eager without a descriptor %v", p.limit, p.eager(1))
	}
}
