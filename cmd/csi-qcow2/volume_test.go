package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"csi-qcow2/volume"
)

// volumeCommand runs `csi-qcow2 volume` and returns its exit code and output.
func volumeCommand(t *testing.T, args ...string) (int, string, string) {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(t.Context(), append([]string{"volume"}, args...), strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// newVolumePool makes a pool with a volume, a snapshot, a clone of it and a
// deleted snapshot that the clone needs; a MiB was written before and after.
func newVolumePool(t *testing.T) (dir string, flags []string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := volume.Open(t.Context(), dir, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(id string, b byte) {
		t.Helper()
		d, err := p.Open(t.Context(), id)
		must(err)
		_, err = d.Image.WriteAt(bytes.Repeat([]byte{b}, 1<<20), 0)
		must(err)
		must(d.Close())
	}
	v, err := p.Create(t.Context(), volume.CreateRequest{Name: "pvc-1", Size: volume.SizeRange{Required: 8 << 20}, Params: volume.DefaultParams()})
	must(err)
	write(v.ID, 1)
	_, err = p.CreateSnapshot(t.Context(), "monday", v.ID)
	must(err)
	write(v.ID, 2)
	s, err := p.CreateSnapshot(t.Context(), "tuesday", v.ID)
	must(err)
	_, err = p.Create(t.Context(), volume.CreateRequest{Name: "pvc-2", Params: volume.DefaultParams(), Source: volume.Source{Snapshot: s.ID}})
	must(err)
	must(p.DeleteSnapshot(t.Context(), s.ID))
	must(p.Close())
	return dir, []string{"--pool", dir, "--endpoint", "unix://" + filepath.Join(dir, "none")}
}

// ids replaces what differs from run to run.
var ids = regexp.MustCompile(`(vol|snap)-[0-9a-f]{8}-[0-9a-f]{32}`)

func TestVolumeTables(t *testing.T) {
	dir, flags := newVolumePool(t)
	for _, c := range []struct {
		command string
		want    []string
	}{
		{"ls", []string{`(?m)^NAME +ID +SIZE +ON HOST +SNAPSHOTS +STATE +POOL$`, `(?m)^pvc-1 +ID +8 MiB +2\.\d+ MiB +1 +- +`, `(?m)^pvc-2 +ID +8 MiB +\d+ KiB +0 +linked +`}},
		{"tree", []string{`(?m)^` + regexp.QuoteMeta(dir) + `\n` +
			`└─ pvc-1 \(ID, 8 MiB\)\n` +
			`   ├─ @ monday \(ID, 8 MiB\)\n` +
			`   └─ @ tuesday \(ID, 8 MiB, deleted, needed by clones\)\n` +
			`      └─ pvc-2 \(ID, 8 MiB, linked\)\n$`}},
		{"du", []string{`(?m)^NAME +ID +ALONE +SHARED +ON HOST +STATE$`, `(?m)^pvc-1 +ID +64 KiB +1\.06 MiB`,
			`(?m)^  @ monday +ID +1\.12 MiB +0 B`, `(?m)^  @ tuesday +ID +64 KiB +1\.06 MiB +deleted, needed by clones`, `(?m)^  metadata +\d+ KiB`}},
	} {
		code, out, errs := volumeCommand(t, append([]string{c.command}, flags...)...)
		if code != exitOK {
			t.Errorf("%s: exit status %d: %s", c.command, code, errs)
		}
		text := ids.ReplaceAllString(out, "ID")
		for _, want := range c.want {
			if !regexp.MustCompile(want).MatchString(text) {
				t.Errorf("%s: no match for %s in\n%s", c.command, want, text)
			}
		}
		code, out, errs = volumeCommand(t, append([]string{c.command, "--output", "json"}, flags...)...)
		var reports []volume.Report
		if err := json.Unmarshal([]byte(out), &reports); err != nil || code != exitOK || len(reports) != 1 || len(reports[0].Volumes) != 2 {
			t.Errorf("%s: json: exit status %d, %v, %s\n%s", c.command, code, err, errs, out)
		}
	}
}

// TestVolumeMakesNoPool: to look at a directory leaves it as it was.
func TestVolumeMakesNoPool(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	code, out, errs := volumeCommand(t, "ls", "--endpoint", "unix://"+filepath.Join(dir, "none.sock"), "--pool", dir)
	if code != 1 || out != "" || !strings.Contains(errs, "pool.json") {
		t.Errorf("code %d, output %q, message %q; want 1, nothing, what is missing", code, out, errs)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left %v, %v", left, err)
	}
}

func TestVolumeRevert(t *testing.T) {
	dir, flags := newVolumePool(t)
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"revert", "pvc-1", "monday"}, exitOK, "monday"},
		{[]string{"revert", "pvc-1", "tuesday"}, exitError, "no snapshot"}, // deleted
		{[]string{"revert", "pvc-2", "monday"}, exitError, "no snapshot"},
		{[]string{"revert", "pvc-3", "monday"}, exitError, `no volume "pvc-3"`},
		{[]string{"revert", "pvc-1"}, exitUsage, "a volume and a snapshot"},
		{[]string{"ls", "x"}, exitUsage, "no argument"},
		{[]string{"ls", "--output", "yaml"}, exitUsage, "--output"},
		{[]string{"ls", "--pool", "relative"}, exitUsage, "--pool"},
		{[]string{"ls", "--endpoint", "tcp://x"}, exitUsage, "--endpoint"},
		{[]string{"ls", "--pool", "/nonexistent"}, exitError, "--endpoint"},
		{[]string{"frobnicate"}, exitUsage, "unknown command"},
	} {
		code, out, errs := volumeCommand(t, append(append([]string{}, flags...), c.args...)...)
		if code != c.code || !strings.Contains(out+errs, c.says) {
			t.Errorf("%q: exit status %d, %s%s; want %d and %q", c.args, code, out, errs, c.code, c.says)
		}
	}
	p, err := volume.Open(t.Context(), dir, volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	id, _ := p.VolumeNamed("pvc-1")
	d, err := p.Open(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, 1<<20)
	if _, err := d.Image.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{1}, 1<<20)) {
		t.Errorf("reverted: %v, or other content than that of the snapshot", err)
	}
	if code, _, errs := volumeCommand(t, append([]string{"ls"}, flags...)...); code != exitError || !strings.Contains(errs, "in use") {
		t.Errorf("a pool that somebody owns: exit status %d, %s", code, errs)
	}
}
