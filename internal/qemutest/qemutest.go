package qemutest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// Package is the Debian package of the tools.
const Package = "qemu-utils"

// path returns where tool is, or fails the test.
func path(tb testing.TB, tool string) string {
	tb.Helper()
	p, err := exec.LookPath(tool)
	if err != nil {
		tb.Fatalf("%s is missing: install it with \"apt-get install %s\"", tool, Package)
	}
	return p
}

// run runs a tool and returns its standard output, all its output and its exit status.
func run(tb testing.TB, stdin, tool string, args ...string) (out, all string, status int) {
	tb.Helper()
	cmd := exec.Command(path(tb, tool), args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		tb.Fatalf("%v: %v", cmd, err)
	}
	return stdout.String(), stdout.String() + stderr.String(), cmd.ProcessState.ExitCode()
}

// Img runs qemu-img, which must succeed, and returns its standard output.
func Img(tb testing.TB, args ...string) string {
	tb.Helper()
	out, all, status := run(tb, "", "qemu-img", args...)
	if status != 0 {
		tb.Fatalf("qemu-img %s: exit status %d\n%s", strings.Join(args, " "), status, all)
	}
	return out
}

// Version returns the version of qemu-img as major*100+minor, 702 for 7.2.
func Version(tb testing.TB) int {
	tb.Helper()
	m := regexp.MustCompile(`version (\d+)\.(\d+)`).FindStringSubmatch(Img(tb, "--version"))
	if m == nil {
		tb.Fatal("qemu-img --version names no version")
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return major*100 + minor
}

// Create makes a qcow2 image of size bytes; opts are options of -o.
func Create(tb testing.TB, path string, size int64, opts ...string) {
	tb.Helper()
	args := []string{"create", "-q", "-f", "qcow2"}
	if len(opts) > 0 {
		args = append(args, "-o", strings.Join(opts, ","))
	}
	Img(tb, append(args, path, strconv.FormatInt(size, 10))...)
}

// A CheckResult is what qemu-img check counts.
type CheckResult struct {
	Corruptions        int   `json:"corruptions"`
	Leaks              int   `json:"leaks"`
	CheckErrors        int   `json:"check-errors"`
	ImageEndOffset     int64 `json:"image-end-offset"`
	TotalClusters      int64 `json:"total-clusters"`
	AllocatedClusters  int64 `json:"allocated-clusters"`
	FragmentedClusters int64 `json:"fragmented-clusters"`
	CompressedClusters int64 `json:"compressed-clusters"`
}

// Judge runs qemu-img check and returns what it counts, and its findings as
// text. It fails the test only if the check itself cannot be done.
func Judge(tb testing.TB, path string) (CheckResult, string) {
	tb.Helper()
	r, text, err := TryJudge(tb, path)
	if err != nil {
		tb.Fatal(err)
	}
	return r, text
}

// TryJudge is Judge, but returns an error if the check cannot be done, as for
// an image that QEMU refuses to open.
func TryJudge(tb testing.TB, path string) (CheckResult, string, error) {
	tb.Helper()
	var r CheckResult
	out, all, status := run(tb, "", "qemu-img", "check", "-f", "qcow2", "--output=json", path)
	if status != 0 && status != 2 && status != 3 {
		return r, all, fmt.Errorf("qemu-img check %s: exit status %d\n%s", path, status, all)
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, all, fmt.Errorf("qemu-img check %s: %w in\n%s", path, err, all)
	}
	if status == 0 {
		return r, all, nil
	}
	// The JSON form says how many, the human one says what.
	_, text, _ := run(tb, "", "qemu-img", "check", "-f", "qcow2", path)
	return r, text, nil
}

// Check fails the test unless qemu-img check finds the image without
// corruption and without leak.
func Check(tb testing.TB, path string) {
	tb.Helper()
	if r, text := Judge(tb, path); r.Corruptions+r.Leaks+r.CheckErrors != 0 {
		tb.Errorf("qemu-img check %s: %d corruptions, %d leaks, %d check errors\n%s", path, r.Corruptions, r.Leaks, r.CheckErrors, head(text))
	}
}

// CheckLeaks is Check, but accepts leaks and returns their number.
func CheckLeaks(tb testing.TB, path string) int {
	tb.Helper()
	r, text := Judge(tb, path)
	if r.Corruptions+r.CheckErrors != 0 {
		tb.Errorf("qemu-img check %s: %d corruptions, %d check errors\n%s", path, r.Corruptions, r.CheckErrors, head(text))
	}
	return r.Leaks
}

// head cuts a long output.
func head(s string) string {
	const limit = 4000
	if len(s) > limit {
		return s[:limit] + "…\n"
	}
	return s
}

// Compare fails the test unless both images have the same content and size.
func Compare(tb testing.TB, format1, path1, format2, path2 string) {
	tb.Helper()
	_, all, status := run(tb, "", "qemu-img", "compare", "-f", format1, "-F", format2, path1, path2)
	if status != 0 {
		tb.Errorf("qemu-img compare %s %s: exit status %d\n%s", path1, path2, status, all)
	}
	if strings.Contains(all, "size mismatch") { // only a warning if the longer one ends in zeroes
		tb.Errorf("qemu-img compare %s %s:\n%s", path1, path2, all)
	}
}

// Raw converts the image, or its internal snapshot if that is not "", to the
// raw file dst.
func Raw(tb testing.TB, path, snapshot, dst string) {
	tb.Helper()
	args := []string{"convert", "-f", "qcow2", "-O", "raw"}
	if snapshot != "" {
		args = append(args, "-l", "snapshot.id="+snapshot)
	}
	Img(tb, append(args, path, dst)...)
}

// An Info is a part of qemu-img info.
type Info struct {
	VirtualSize     int64  `json:"virtual-size"`
	ClusterSize     int64  `json:"cluster-size"`
	Format          string `json:"format"`
	ActualSize      int64  `json:"actual-size"`
	DirtyFlag       bool   `json:"dirty-flag"`
	BackingFilename string `json:"backing-filename"`
	Snapshots       []struct {
		ID   string `json:"id"`
		Name string `json:"name"`
	} `json:"snapshots"`
	FormatSpecific struct {
		Data struct {
			Compat          string `json:"compat"`
			CompressionType string `json:"compression-type"`
			LazyRefcounts   bool   `json:"lazy-refcounts"`
			RefcountBits    int    `json:"refcount-bits"`
			Corrupt         bool   `json:"corrupt"`
			ExtendedL2      bool   `json:"extended-l2"`
		} `json:"data"`
	} `json:"format-specific"`
}

// GetInfo returns what qemu-img info says; the image may be in use.
func GetInfo(tb testing.TB, path string) Info {
	tb.Helper()
	var i Info
	unmarshal(tb, Img(tb, "info", "-U", "--output=json", "-f", "qcow2", path), &i)
	return i
}

// An Extent is one entry of qemu-img map.
type Extent struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset"` // nil if none
}

// Map returns what qemu-img map says.
func Map(tb testing.TB, path string) []Extent {
	tb.Helper()
	var e []Extent
	unmarshal(tb, Img(tb, "map", "--output=json", "-f", "qcow2", path), &e)
	return e
}

func unmarshal(tb testing.TB, text string, v any) {
	tb.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		tb.Fatalf("%v in output of qemu-img:\n%s", err, text)
	}
}
