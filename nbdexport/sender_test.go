package nbdexport

import (
	"bytes"
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

// A slowReader is a connection whose client reads step bytes within each write deadline.
type slowReader struct {
	net.Conn
	step      int
	deadlines int
	got       []byte
}

func (s *slowReader) SetWriteDeadline(time.Time) error { s.deadlines++; return nil }

func (s *slowReader) Write(p []byte) (int, error) {
	n := min(len(p), s.step)
	s.got = append(s.got, p[:n]...)
	if n < len(p) {
		return n, os.ErrDeadlineExceeded
	}
	return n, nil
}

// TestSlowReadersKeepTheirConnection checks that replies go on for as long as
// the client reads some of them before each deadline, and end when it reads none.
func TestSlowReadersKeepTheirConnection(t *testing.T) {
	for _, tt := range []struct {
		name  string
		parts []string
	}{
		{"one part", []string{"0123456789"}},
		{"two parts", []string{"01234", "56789"}},
	} {
		var parts net.Buffers
		for _, p := range tt.parts {
			parts = append(parts, []byte(p))
		}
		slow := &slowReader{step: 3}
		if err := newSender(slow, connBudget, time.Hour).write(&parts); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if !bytes.Equal(slow.got, []byte("0123456789")) {
			t.Errorf("%s: the client got %q", tt.name, slow.got)
		}
		if slow.deadlines < 3 {
			t.Errorf("%s: %d deadlines: want one for each time that the client has read", tt.name, slow.deadlines)
		}
	}
	parts := net.Buffers{[]byte("reply")}
	if err := newSender(&slowReader{}, connBudget, time.Hour).write(&parts); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("of a client that reads nothing: %v: want a timeout", err)
	}
}
