package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/qcow2"
)

// TestImgConvertHuge converts a nearly empty overlay of 1 TiB.
func TestImgConvertHuge(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, `
		qemu-img create -q -f qcow2 base.qcow2 1T
		qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 500G 64k' base.qcow2
		qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
		qemu-io -c 'write -P 3 1023G 1M' -c 'write -z 0 64k' top.qcow2
	`)
	for _, target := range []string{"out.qcow2", "out.raw"} {
		format := target[4:]
		if r := runImg(t, "convert", "-O", format, "top.qcow2", target); r.code != 0 {
			t.Fatalf("%+v", r)
		}
		if used, err := hostBytes(target); err != nil || used > 8<<20 {
			t.Errorf("%s takes %d bytes (%v)", target, used, err)
		}
		if r := runImg(t, "compare", "-F", format, "top.qcow2", target); r.code != 0 {
			t.Errorf("%s: %+v", target, r)
		}
		qemutest.Compare(t, "qcow2", "top.qcow2", format, target)
	}
	qemutest.Check(t, "out.qcow2")
}

// TestImgConvertPreallocated converts 256 GiB of preallocated metadata: the
// holes of the host file must not be read.
func TestImgConvertPreallocated(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, `
		qemu-img create -q -f qcow2 -o preallocation=metadata,cluster_size=2M src.qcow2 256G
		qemu-io -c 'write -P 1 100G 1M' src.qcow2
	`)
	if r := runImg(t, "convert", "-O", "qcow2", "src.qcow2", "out.qcow2"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if r := runImg(t, "compare", "src.qcow2", "out.qcow2"); r.code != 0 {
		t.Errorf("%+v", r)
	}
	if used, err := hostBytes("out.qcow2"); err != nil || used > 8<<20 {
		t.Errorf("the target takes %d bytes (%v)", used, err)
	}
	qemutest.Compare(t, "qcow2", "src.qcow2", "qcow2", "out.qcow2")
	qemutest.Check(t, "out.qcow2")
}

// TestImgLocked runs each subcommand on images that another process has open.
func TestImgLocked(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, `
		qemu-img create -q -f qcow2 a.qcow2 1M
		qemu-img create -q -f qcow2 b.qcow2 1M
	`)
	f, err := qcow2.OpenFile("a.qcow2", qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before, err := os.ReadFile("a.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"info a.qcow2", "info -U a.qcow2", "check a.qcow2", "check -r all a.qcow2", "check -U a.qcow2", "map a.qcow2", "map -U a.qcow2",
		"snapshot -l a.qcow2", "snapshot -l -U a.qcow2", "snapshot -c x a.qcow2", "resize a.qcow2 2M", "rebase -u -b x -F raw a.qcow2",
		"convert -O raw a.qcow2 c.raw", "convert -U -O raw a.qcow2 d.raw", "convert -O qcow2 b.qcow2 a.qcow2", "convert -n -O qcow2 b.qcow2 a.qcow2",
		"compare a.qcow2 b.qcow2", "compare -U b.qcow2 a.qcow2", "create -f qcow2 a.qcow2 1M", "create -f raw a.qcow2 1M", "measure -O qcow2 a.qcow2",
		"create -f qcow2 -b a.qcow2 -F qcow2 e.qcow2",
		"info -f raw a.qcow2", "map -f raw a.qcow2", "convert -f raw -O raw a.qcow2 f.raw", "convert -U -f raw -O raw a.qcow2 g.raw",
		"convert -n -f raw -O raw b.qcow2 b.qcow2",
	} {
		args := split(line)
		want, got := runQemuImg(t, args...), runImg(t, args...)
		if w := strings.ReplaceAll(want.stderr, "qemu-img", imgProgram); got.code != want.code || got.stderr != w {
			t.Errorf("%s: exit code %d, %q; want %d, %q", line, got.code, got.stderr, want.code, w)
		}
	}
	if after, err := os.ReadFile("a.qcow2"); err != nil || string(after) != string(before) {
		t.Errorf("the locked image has changed (%v)", err)
	}
}

// TestImgTargetIsRead makes images of files that the new image would read: qemu-img
// empties them.
func TestImgTargetIsRead(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, `
		qemu-img create -q -f qcow2 base.qcow2 1M
		qemu-io -c 'write -P 7 0 1M' base.qcow2
		qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2
		qemu-img create -q -f qcow2 -b over.qcow2 -F qcow2 top.qcow2
		qemu-img create -q -f qcow2 other.qcow2 1M
		ln -s base.qcow2 link.qcow2
	`)
	before, err := os.ReadFile("base.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"create -f qcow2 -b ./base.qcow2 -F qcow2 base.qcow2", "create -f qcow2 -b base.qcow2 -F qcow2 link.qcow2",
		"create -f qcow2 -b top.qcow2 -F qcow2 base.qcow2", "create -f qcow2 -u -b ./base.qcow2 -F qcow2 base.qcow2 1M",
		"convert -O qcow2 -B base.qcow2 -F qcow2 other.qcow2 base.qcow2", "convert -O qcow2 -B top.qcow2 -F qcow2 other.qcow2 base.qcow2",
		"convert -U -O qcow2 top.qcow2 base.qcow2", "convert -U -O raw over.qcow2 link.qcow2", "convert -U -n -O qcow2 over.qcow2 base.qcow2",
		"convert -U -n -O qcow2 base.qcow2 base.qcow2", "convert -U -O raw other.qcow2 base.qcow2 link.qcow2",
	} {
		if r := runImg(t, split(line)...); r.code != 1 || r.stderr == "" {
			t.Errorf("%s: %+v, want a refusal", line, r)
		}
		after, err := os.ReadFile("base.qcow2")
		if err != nil {
			t.Fatal(err)
		}
		if string(after) != string(before) {
			t.Fatalf("%s: base.qcow2 has changed", line)
		}
	}
}

// TestImgWithoutSpace lets what takes space in advance fail: it leaves nothing behind.
func TestImgWithoutSpace(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=3M", "none", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s (the test needs root)", err, out)
	}
	defer func() {
		if out, err := exec.Command("umount", "--lazy", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	}()
	t.Chdir(dir)
	if err := os.WriteFile("old.raw", make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		line, file string
		size       int64
	}{
		{"create -f raw -o preallocation=full new.raw 8M", "new.raw", 0},
		{"create -f raw -o preallocation=falloc new.raw 8M", "new.raw", 0},
		{"create -f qcow2 -o preallocation=full new.qcow2 8M", "new.qcow2", 0},
		{"create -f qcow2 -o preallocation=falloc new.qcow2 8M", "new.qcow2", 0},
		{"resize -f raw --preallocation=full old.raw 8M", "old.raw", 1 << 20},
		{"resize -f raw --preallocation=falloc old.raw 8M", "old.raw", 1 << 20},
	} {
		r := runImg(t, split(tt.line)...)
		if r.code != 1 || !strings.Contains(r.stderr, "No space left on device") {
			t.Errorf("%s: %+v", tt.line, r)
		}
		if st, err := os.Stat(tt.file); err != nil || st.Size() != tt.size {
			t.Errorf("%s: %v, %v; want %d bytes", tt.line, st, err, tt.size)
		}
		if used, err := hostBytes(tt.file); err != nil || used != tt.size {
			t.Errorf("%s: the file takes %d bytes (%v), want %d", tt.line, used, err, tt.size)
		}
	}
}

// TestImgEmptyNames gives names that are empty, as variables in a script are.
func TestImgEmptyNames(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, "qemu-img create -q -f qcow2 a.qcow2 1M")
	for _, args := range [][]string{
		{"create", "-f", "qcow2", "-b", "", "-F", "qcow2", "new", "1M"}, {"create", "-f", "qcow2", "-b", "", "new", "1M"},
		{"create", "-f", "qcow2", "-u", "-b", "", "new", "1M"}, {"create", "-f", "qcow2", "-o", "backing_file=", "new", "1M"},
		{"convert", "-O", "qcow2", "-B", "", "a.qcow2", "new"}, {"convert", "-O", "qcow2", "-o", "backing_file=", "a.qcow2", "new"},
		{"info", ""}, {"info", "--output=json", "--backing-chain", ""}, {"map", ""}, {"check", ""}, {"snapshot", "-l", ""},
		{"resize", "", "2M"}, {"create", "-f", "qcow2", "", "1M"}, {"convert", "-O", "qcow2", "a.qcow2", ""}, {"convert", "-O", "qcow2", "", "new"},
	} {
		if r := runImg(t, args...); r.code != 1 || r.stderr == "" || r.stdout != "" && args[0] != "create" {
			t.Errorf("%q: %+v, want a refusal", args, r)
		}
		if _, err := os.Lstat("new"); err == nil {
			t.Fatalf("%q has made an image", args)
		}
	}
}

// TestImgProgress looks at the display while it moves.
func TestImgProgress(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, `
		qemu-img create -q -f raw a.raw 32M
		qemu-io -f raw -c 'write -P 1 0 32M' a.raw
	`)
	r := runImg(t, "convert", "-p", "-f", "raw", "-O", "qcow2", "a.raw", "b.qcow2")
	if !regexp.MustCompile(`^    \(0\.00/100%\)\r(    \(\d+\.\d\d/100%\)\r){2,}    \(100\.00/100%\)\r\n$`).MatchString(r.stdout) {
		t.Errorf("progress is %q", r.stdout)
	}
}

// TestImgMatrix converts random images of QEMU to targets of every cluster
// size and back, plain and compressed, and lets qemu-img judge.
func TestImgMatrix(t *testing.T) {
	t.Chdir(t.TempDir())
	for i, cluster := range []string{"512", "1k", "4k", "64k", "256k", "2M"} {
		for j, kind := range []string{"", "-c", "-c -o compression_type=zstd", "-W -m 16", "-o compat=0.10"} {
			name := fmt.Sprintf("%d-%d", i, j)
			qemuScript(t, fmt.Sprintf(`
				qemu-img create -q -f qcow2 -o cluster_size=%[1]s base%[2]s.qcow2 6M
				qemu-io -c 'write -P 1 %[3]d 1M' -c 'write -z 3M 300k' -c 'write -P 2 5000k 700k' base%[2]s.qcow2
				qemu-img create -q -f qcow2 -b base%[2]s.qcow2 -F qcow2 src%[2]s.qcow2 7M
				qemu-io -c 'write -P 3 1500k 200k' -c 'write -z 100k 77k' -c 'write -P 4 6800k 5k' src%[2]s.qcow2
			`, cluster, name, i*1000+j*77))
			args := append([]string{"convert", "-O", "qcow2", "-o", "cluster_size=" + cluster}, strings.Fields(kind)...)
			if r := runImg(t, append(args, "src"+name+".qcow2", name+".qcow2")...); r.code != 0 {
				t.Errorf("%s: %+v", name, r)
				continue
			}
			qemutest.Check(t, name+".qcow2")
			qemutest.Compare(t, "qcow2", "src"+name+".qcow2", "qcow2", name+".qcow2")
			// And what QEMU makes of ours is read by us.
			qemuScript(t, fmt.Sprintf("qemu-img convert -O qcow2 %s %s.qcow2 back%s.qcow2", kind, name, name))
			if r := runImg(t, "compare", "back"+name+".qcow2", name+".qcow2"); r.code != 0 {
				t.Errorf("%s: %+v", name, r)
			}
			if r := runImg(t, "check", "back"+name+".qcow2"); r.code != 0 {
				t.Errorf("%s: %+v", name, r)
			}
			if out, err := exec.Command("sh", "-c", "rm -f *"+name+".qcow2").CombinedOutput(); err != nil {
				t.Fatalf("%s", out)
			}
		}
	}
}

// TestImgConvertToDevice converts onto a block device full of other data, as
// a disk is restored.
func TestImgConvertToDevice(t *testing.T) {
	t.Chdir(t.TempDir())
	qemuScript(t, `
		qemu-img create -q -f qcow2 src.qcow2 8M
		qemu-io -c 'write -P 1 1M 1M' -c 'write -P 2 7M 512' src.qcow2
		qemu-img create -q -f raw disk.img 8M
		qemu-io -f raw -c 'write -P 255 0 8M' disk.img
	`)
	out, err := exec.Command("losetup", "--find", "--show", "disk.img").Output()
	if err != nil {
		t.Fatalf("losetup: %v (the test needs root and loop devices)", err)
	}
	device := strings.TrimSpace(string(out))
	defer func() {
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("losetup: %v: %s", err, out)
		}
	}()
	if r := runImg(t, "convert", "-O", "raw", "-t", "none", "src.qcow2", device); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	if r := runImg(t, "compare", "-F", "raw", "src.qcow2", device); r.code != 0 {
		t.Errorf("%+v", r)
	}
	qemutest.Compare(t, "qcow2", "src.qcow2", "raw", device)
	qemuScript(t, "qemu-img create -q -f qcow2 large.qcow2 9M")
	for _, line := range []string{"convert -O raw large.qcow2 " + device, "convert -O qcow2 src.qcow2 " + device, "create -f qcow2 " + device + " 1M"} {
		if r := runImg(t, split(line)...); r.code != 1 {
			t.Errorf("%s: %+v", line, r)
		}
	}
	qemutest.Compare(t, "qcow2", "src.qcow2", "raw", device)
}
