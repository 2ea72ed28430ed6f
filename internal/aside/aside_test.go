package aside

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

var (
	errNamed   = errors.New("named")
	errUnnamed = errors.New("unnamed")

	double = Op("double", func(n int, _ []*os.File) (int, error) { return 2 * n, nil })
	pid    = Op("pid", func(struct{}, []*os.File) (int, error) { return os.Getpid(), nil })
	write  = Op("write", func(s string, files []*os.File) (int, error) { return files[0].WriteString(s) })
	fail   = Op("fail", func(how string, _ []*os.File) (string, error) {
		switch how {
		case "named":
			return "half", errors.Join(errNamed, syscall.ENOTTY)
		case "exit":
			os.Stderr.WriteString("no more\n")
			os.Exit(7)
		}
		return "", errUnnamed
	}, errNamed)
	wait = Op("wait", func(struct{}, []*os.File) (struct{}, error) { return struct{}{}, syscall.Pause() })
)

func TestMain(m *testing.M) {
	if status, child := Main(); child {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

func TestCallsAreMadeByChildren(t *testing.T) {
	if n, err := double(t.Context(), 21); n != 42 || err != nil {
		t.Errorf("double: %d, %v", n, err)
	}
	if child, err := pid(t.Context(), struct{}{}); child == os.Getpid() || err != nil {
		t.Errorf("process %d, %v; this is %d", child, err, os.Getpid())
	}
	able = false
	defer func() { able = true }()
	if self, err := pid(t.Context(), struct{}{}); self != os.Getpid() || err != nil {
		t.Errorf("process %d, %v; this is %d", self, err, os.Getpid())
	}
}

func TestFilesAreLent(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := write(t.Context(), "through a pipe", w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if got, err := io.ReadAll(r); string(got) != "through a pipe" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestErrorsComeBack(t *testing.T) {
	out, err := fail(t.Context(), "named")
	if out != "half" || !errors.Is(err, errNamed) || !errors.Is(err, syscall.ENOTTY) || !strings.Contains(err.Error(), "named") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := fail(t.Context(), "unnamed"); err == nil || errors.Is(err, errUnnamed) || err.Error() != "unnamed" {
		t.Errorf("an error that is not among the sentinels: %v", err)
	}
	if _, err := fail(t.Context(), "exit"); err == nil || !strings.Contains(err.Error(), "no more") {
		t.Errorf("a child that ends early: %v", err)
	}
}

// TestCallerNeedNotWait: a caller leaves a child that hangs, as one does in the kernel.
func TestCallerNeedNotWait(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := wait(ctx, struct{}{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// TestUnknownOperation: a child that is asked for what it does not know says so.
func TestUnknownOperation(t *testing.T) {
	if err := serve([]string{"nothing", "{}"}); err == nil {
		t.Error("no error")
	}
}
