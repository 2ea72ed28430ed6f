//go:build sabotage

package sabotage

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

var (
	deadline = flag.Duration("deadline", 5*time.Minute, "after how long a run that has not noticed its mutant is ended, without building")
	// Of processor time, because machines have other work.
	limit = flag.Duration("limit", time.Minute, "processor time that the tests may take to notice a mutant, without building")
)

// TestMutantsAreCaught builds and tests every mutant.
func TestMutantsAreCaught(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	var tried atomic.Int64
	t.Run("mutants", func(t *testing.T) {
		for _, m := range mutants {
			t.Run(m.name, func(t *testing.T) {
				t.Parallel()
				tried.Add(1)
				m.test(t, root)
			})
		}
	})
	if !t.Failed() {
		t.Logf("sabotage: %d mutants, all caught", tried.Load())
	}
}

// test fails unless the tests notice m.
func (m *mutant) test(t *testing.T, root string) {
	file := filepath.Join(root, m.file)
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(source, []byte(m.old)); n != 1 {
		t.Fatalf("the text that this mutant replaces occurs %d times in %s, want once:\n%s", n, m.file, m.old)
	}
	dir := t.TempDir()
	mutated := filepath.Join(dir, filepath.Base(m.file))
	if err := os.WriteFile(mutated, bytes.Replace(source, []byte(m.old), []byte(m.new), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {file: mutated}})
	if err != nil {
		t.Fatal(err)
	}
	overlayFile := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(overlayFile, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "mutant.test")
	build := exec.Command("go", "test", "-c", "-overlay", overlayFile, "-o", binary, "./"+m.pkg)
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("the mutant does not compile: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), *deadline)
	defer cancel()
	run := exec.CommandContext(ctx, binary, "-test.failfast", "-test.run", m.run)
	run.Dir = filepath.Join(root, m.pkg)
	// A test that builds the command builds the mutant.
	run.Env = append(os.Environ(), "GOFLAGS=-overlay="+overlayFile)
	run.WaitDelay = 5 * time.Second
	start := time.Now()
	out, err := run.CombinedOutput()
	text := string(out)
	used := run.ProcessState.UserTime() + run.ProcessState.SystemTime()
	switch {
	case ctx.Err() != nil:
		t.Errorf("not noticed in %v", *deadline)
	case err == nil:
		t.Errorf("not noticed: all tests pass")
	case !strings.Contains(text, "--- FAIL") && !strings.Contains(text, "panic:") && !strings.Contains(text, "fatal error:"):
		t.Errorf("the run failed, but no test did: %v\n%s", err, tail(text))
	case used > *limit:
		t.Errorf("noticed only after %v of processor time, want %v: %s", used.Round(time.Second), *limit, firstFailure(text))
	default:
		t.Logf("noticed in %v, %v of processor time: %s", time.Since(start).Round(100*time.Millisecond), used.Round(100*time.Millisecond), firstFailure(text))
	}
}

// firstFailure returns the line that names the first failed test.
func firstFailure(out string) string {
	for line := range strings.Lines(out) {
		if strings.Contains(line, "--- FAIL") || strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

func tail(out string) string { return out[max(0, len(out)-2000):] }
