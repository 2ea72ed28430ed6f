package main

import (
	"bytes"
	"strings"
	"testing"
)

// runArgs runs a command line and returns its exit code and outputs.
func runArgs(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(t.Context(), args, strings.NewReader(""), &out, &err)
	return code, out.String(), err.String()
}

func TestVersion(t *testing.T) {
	code, out, said := runArgs(t, "version")
	if code != exitOK || !strings.HasPrefix(out, "csi-qcow2 ") || said != "" {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, out, said)
	}
}

func TestHelpNamesTheSubcommands(t *testing.T) {
	for _, args := range [][]string{{}, {"help"}, {"--help"}} {
		code, out, _ := runArgs(t, args...)
		if code != exitOK {
			t.Errorf("%q: exit code %d, want 0", args, code)
		}
		for _, name := range []string{"node", "demo", "img", "nbd", "version"} {
			if !strings.Contains(out, "\n  "+name+" ") {
				t.Errorf("%q does not name %s:\n%s", args, name, out)
			}
		}
	}
}

// TestBadUsage: what a person or a manifest got wrong is exit code 2 and one
// line that names it; no work has begun.
func TestBadUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string // in the message
	}{
		{[]string{"frobnicate"}, `"frobnicate"`},
		{[]string{"--frobnicate"}, "--frobnicate"},
		{[]string{"demo", "--frobnicate"}, "--frobnicate"},
		{[]string{"demo", "--device", "floppy"}, `"floppy"`},
		{[]string{"demo", "--keep=perhaps"}, "perhaps"},
		{[]string{"demo", "now"}, `"now"`},
		{[]string{"demo", "--stop"}, "--dir"},
		{[]string{"version", "--frobnicate"}, "--frobnicate"},
		{[]string{"version", "now"}, `"now"`},
		{[]string{"node", "--frobnicate"}, "--frobnicate"},
		{[]string{"node", "--device", "floppy"}, `"floppy"`},
		{[]string{"node", "now"}, `"now"`},
		{[]string{"holder", "--run-dir", "here"}, `"here"`},
		{[]string{"holder", "now"}, `"now"`},
	} {
		code, out, said := runArgs(t, c.args...)
		if code != exitUsage || !strings.Contains(said, c.want) || strings.Count(said, "\n") != 1 || out != "" {
			t.Errorf("%q: exit code %d, stdout %q, stderr %q; want exit code 2 and one line with %s", c.args, code, out, said, c.want)
		}
	}
}
