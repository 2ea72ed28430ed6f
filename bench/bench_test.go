package main

import (
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"csi-qcow2/internal/storagetest"
)

// sizesOfSmoke let every line run in a moment.
var sizesOfSmoke = sizes{
	warm: 1 << 20, full: 32 << 20, fresh: 1 << 30, large: 8 << 30, overlay: 8 << 30, volume: 8 << 30,
	growth: []int64{64 << 20, 128 << 20}, depths: []int{1, 2}, exports: 4,
}

// TestEveryLineRuns runs every line once on tiny images, and writes the report:
// it says nothing about speed.
func TestEveryLineRuns(t *testing.T) {
	o := options{pairs: 1, time: 50 * time.Millisecond, dir: storagetest.MemoryDir(t), disk: t.TempDir()}
	e, err := newEnv(t.Context(), o, sizesOfSmoke)
	if err != nil {
		t.Fatal(err)
	}
	defer e.close()
	e.scout, e.terminal = false, false
	// The program that plays a role is this one, not the test.
	e.self = e.path("bench")
	if err := command(t.Context(), "go", "build", "-buildvcs=false", "-o", e.self, "."); err != nil {
		t.Fatal(err)
	}
	var rs results
	for _, l := range lines(sizesOfSmoke) {
		r, err := e.runLine(t.Context(), l)
		if err != nil {
			t.Errorf("%s: %v", l.name, err)
			continue
		}
		if len(r.verdicts()) == 0 {
			t.Errorf("%s: no verdict", l.name)
		}
		t.Log(r.text())
		rs.put(r)
	}
	if t.Failed() {
		return
	}
	dir := t.TempDir()
	if err := rs.write(dir); err != nil {
		t.Fatal(err)
	}
	again, err := loadResults(dir)
	if err != nil || !again.has("read-4k-qd32", e.machine) {
		t.Errorf("results read again: %v, %d of them: want those of read-4k-qd32 among them", err, len(again.all))
	}
	checkReport(t, dir)
}

// checkReport checks that RESULTS.md has a row for each line and shows every
// chart, and that the charts are XML.
func checkReport(t *testing.T, dir string) {
	text, err := os.ReadFile(filepath.Join(dir, "RESULTS.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lines(sizesOfSmoke) {
		if !strings.Contains(string(text), "| "+l.title+" |") {
			t.Errorf("RESULTS.md has no row for %s", l.name)
		}
	}
	charts, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil || len(charts) < len(groups) {
		t.Fatalf("charts %q, %v: want one for each group", charts, err)
	}
	for _, path := range charts {
		if !strings.Contains(string(text), "("+filepath.Base(path)+")") {
			t.Errorf("RESULTS.md does not show %s", filepath.Base(path))
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		d := xml.NewDecoder(f)
		for err == nil {
			_, err = d.Token()
		}
		if err != io.EOF {
			t.Errorf("%s: %v", filepath.Base(path), err)
		}
	}
}

// TestMissingPeer checks that a peer that is not installed is an error that
// says what to install.
func TestMissingPeer(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := newEnv(t.Context(), options{pairs: 1, dir: t.TempDir(), disk: t.TempDir()}, sizesOfSmoke)
	if err == nil || !strings.Contains(err.Error(), "qemu-utils") || !strings.Contains(err.Error(), "nbdkit") {
		t.Errorf("error %v: want one that names the packages", err)
	}
}

// TestCompare checks the arithmetic of ratios.
func TestCompare(t *testing.T) {
	for _, tt := range []struct {
		name         string
		unit         unit
		ours, theirs []float64
		want         comparison
	}{
		{"more is better", iops, []float64{30, 10, 20}, []float64{10, 10, 10}, comparison{2, 1, 3}},
		{"less is better", seconds, []float64{1, 2}, []float64{3, 3}, comparison{2, 1.5, 3}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := compare(tt.unit, tt.ours, tt.theirs); got != tt.want {
				t.Errorf("got %+v: want %+v", got, tt.want)
			}
		})
	}
}

// TestGrowth checks that a curve is judged by what its work costs.
func TestGrowth(t *testing.T) {
	at := func(label string, figures ...float64) series { return series{Name: "x", At: label, Samples: figures} }
	r := result{Axis: "size", Unit: iops, Series: []series{
		at("1", 1000, 1000, 1000), at("1", 500, 500, 500),
		at("9", 900, 900, 900), at("9", 490, 490, 490),
	}}
	// Ours rises from 1 to 1.11 ms, theirs from 2 to 2.04 ms.
	if v := r.growthVerdict(); v.held != yesNo(false) {
		t.Errorf("verdict %+v: want that it does not hold", v)
	}
	r.Series[2].Samples = []float64{990, 990, 990}
	if v := r.growthVerdict(); v.held != yesNo(true) {
		t.Errorf("verdict %+v: want that it holds", v)
	}
	r.Kept = 0.995
	if v := r.growthVerdict(); v.held != yesNo(false) {
		t.Errorf("verdict %+v: want that too little is kept", v)
	}
}
