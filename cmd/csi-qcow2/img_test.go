package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"csi-qcow2/internal/qemutest"
)

// An imgRun is what one command line did.
type imgRun struct {
	stdout, stderr string
	code           int
}

// runImg runs "img" with args in the current directory.
func runImg(t *testing.T, args ...string) imgRun {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), append([]string{"img"}, args...), strings.NewReader(""), &stdout, &stderr)
	return imgRun{stdout.String(), stderr.String(), code}
}

// runQemuImg runs qemu-img with args in the current directory.
func runQemuImg(t *testing.T, args ...string) imgRun {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("qemu-img", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("qemu-img: %v: install qemu-utils", err)
	}
	return imgRun{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// qemuScript runs tools of QEMU, one command a line, and fails the test if one fails.
func qemuScript(t *testing.T, script string) {
	t.Helper()
	for line := range strings.Lines(script) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		out, err := exec.Command("sh", "-c", line).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s (install qemu-utils)", line, err, out)
		}
	}
}

// imgFixtures make the images that the command lines work on.
const imgFixtures = `
	qemu-img create -q -f qcow2 empty.qcow2 64M
	qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=4k v2.qcow2 8M
	qemu-io -c 'write -P 3 0 1M' -c 'write -P 4 5M 12k' v2.qcow2
	qemu-img create -q -f qcow2 snap.qcow2 16M
	qemu-io -c 'write -P 1 0 128k' snap.qcow2
	qemu-img snapshot -c one snap.qcow2
	qemu-img snapshot -c two snap.qcow2
	qemu-io -c 'write -P 2 64k 128k' -c 'write -z 1M 1M' -c 'write -P 9 10000000 3' snap.qcow2
	qemu-img create -q -f qcow2 -b snap.qcow2 -F qcow2 over.qcow2 24M
	qemu-io -c 'write -P 7 192k 64k' -c 'write -z 0 64k' -c 'write -P 8 20M 100k' over.qcow2
	qemu-img create -q -f qcow2 -b over.qcow2 -F qcow2 -o cluster_size=512 top.qcow2
	qemu-io -c 'write -P 5 1000 3000' top.qcow2
	mkdir sub
	qemu-img create -q -f qcow2 -b ../raw.img -u -F raw -o cluster_size=2M sub/rel.qcow2 8M
	qemu-img create -q -f qcow2 -u -b nofile.qcow2 -F qcow2 orphan.qcow2 10M
	qemu-img convert -c -O qcow2 snap.qcow2 comp.qcow2
	qemu-img convert -c -O qcow2 -o compression_type=zstd snap.qcow2 zstd.qcow2
	qemu-img create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=64,cluster_size=512 odd.qcow2 1M
	qemu-io -c 'write -P 6 0 1M' odd.qcow2
	qemu-img create -q -f qcow2 -o preallocation=metadata prealloc.qcow2 8M
	qemu-img create -q -f raw raw.img 8M
	qemu-io -f raw -c 'write -P 1 64k 64k' -c 'write -P 2 7M 1M' raw.img
	printf '%0700d' 0 > tiny.img
	cp snap.qcow2 leak.qcow2
	printf '\0\2' | dd of=leak.qcow2 bs=1 seek=131092 conv=notrunc status=none
	printf 'KDMV0000000000000000' > other.vmdk
	ln -s snap.qcow2 link.qcow2
	qemu-img create -q -f qcow2 -u -b loop2.qcow2 -F qcow2 loop1.qcow2 1M
	qemu-img create -q -f qcow2 -u -b loop1.qcow2 -F qcow2 loop2.qcow2 1M
`

// makeImgFixtures makes the fixtures in dir.
func makeImgFixtures(t *testing.T, dir string) {
	t.Helper()
	t.Chdir(dir)
	qemuScript(t, imgFixtures)
}

// copyDir copies the tree of regular files and links src to dst. Images of
// qcow2 format get no holes: from these qemu-img guesses at preallocation.
func copyDir(t *testing.T, dst, src string) {
	t.Helper()
	qemuScript(t, fmt.Sprintf(`
		cp -a %[2]s/. %[1]s
		cd %[2]s && find . -type f -name '*.qcow2' -exec cp -p --sparse=never {} %[1]s/{} ';'
	`, dst, src))
}

// An imgCase is command lines that are run one after another by qemu-img and
// by ours, each in a directory of its own with the fixtures.
type imgCase struct {
	lines  string
	differ string // why the messages may differ; exit codes and images may not
	litter string // a file that qemu-img leaves behind after an error
}

// split splits a command line at blanks; a word may be in single quotes.
func split(line string) []string {
	var words []string
	for _, m := range regexp.MustCompile(`'([^']*)'|(\S+)`).FindAllStringSubmatch(line, -1) {
		words = append(words, m[1]+m[2])
	}
	return words
}

// checkImgCase runs the command lines and compares what is seen of them.
func checkImgCase(t *testing.T, fixtures string, tc imgCase) {
	t.Helper()
	theirs, ours := t.TempDir(), t.TempDir()
	copyDir(t, theirs, fixtures)
	copyDir(t, ours, fixtures)
	for line := range strings.Lines(tc.lines) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		args := split(line)
		t.Chdir(theirs)
		want := runQemuImg(t, args...)
		t.Chdir(ours)
		got := runImg(t, args...)
		want.stdout, want.stderr = strings.ReplaceAll(want.stdout, "qemu-img", imgProgram), strings.ReplaceAll(want.stderr, "qemu-img", imgProgram)
		if got.code != want.code {
			t.Errorf("%s: exit code %d, want %d\n%s%s", line, got.code, want.code, got.stdout, got.stderr)
		}
		if tc.differ != "" {
			continue
		}
		for _, s := range []struct{ name, got, want string }{{"stdout", got.stdout, want.stdout}, {"stderr", got.stderr, want.stderr}} {
			if g, w := normalise(s.got), normalise(s.want); g != w {
				t.Errorf("%s: %s:\n%s\nqemu-img:\n%s", line, s.name, g, w)
			}
		}
	}
	if tc.litter != "" {
		if err := os.Remove(filepath.Join(theirs, tc.litter)); err != nil {
			t.Fatal(err)
		}
	}
	compareDirs(t, ours, theirs)
}

// normalisers remove what depends on the clock, on where an image puts its
// clusters, or on how far a progress display was at some moment.
var normalisers = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`), "DATE"},
	{regexp.MustCompile(`"date-n?sec": \d+`), "DATE"},
	{regexp.MustCompile(`disk size: .*`), "disk size: N"},
	{regexp.MustCompile(`"actual-size": \d+`), `"actual-size": N`},
	{regexp.MustCompile(`(    \([0-9.]+/100%\)\r)+`), "PROGRESS\r"},
	// qemu-img 7.2 records an instruction count of 0 where it has none; later ones do not, nor do we.
	{regexp.MustCompile(`(:\d\d\.\d{3}) +0?\n`), "$1\n"},
	{regexp.MustCompile(`\s*"icount": 0,`), ""},
}

func normalise(s string) string {
	for _, n := range normalisers {
		s = n.re.ReplaceAllString(s, n.with)
	}
	return strings.TrimRight(s, "\n")
}

// compareDirs demands the same files in both directories, and that those that
// are images have the same content, description and health.
func compareDirs(t *testing.T, ours, theirs string) {
	t.Helper()
	names := map[string]int{}
	for i, dir := range []string{ours, theirs} {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				rel, _ := filepath.Rel(dir, path)
				names[rel] |= 1 << i
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, where := range names {
		if where != 3 {
			t.Errorf("%s: made by only one of both (%d)", name, where)
			continue
		}
		a, b := filepath.Join(ours, name), filepath.Join(theirs, name)
		if same(t, a, b) {
			continue
		}
		format := "raw"
		if head, err := os.ReadFile(a); err == nil && bytes.HasPrefix(head, []byte("QFI\xfb")) {
			format = "qcow2"
			describe := func(path string) string {
				t.Chdir(filepath.Dir(path))
				r := runQemuImg(t, "info", "-f", format, "--output=json", filepath.Base(path))
				return normalise(r.stdout + r.stderr)
			}
			if got, want := describe(a), describe(b); got != want {
				t.Errorf("%s: qemu-img info of ours:\n%s\nof theirs:\n%s", name, got, want)
			}
			r, text, err := qemutest.TryJudge(t, a)
			if err != nil {
				if _, _, err := qemutest.TryJudge(t, b); err == nil {
					t.Errorf("%s: qemu-img opens theirs only: %s", name, text)
				}
				continue // its backing file is absent
			}
			if r.Corruptions+r.Leaks+r.CheckErrors > 0 {
				t.Errorf("%s: qemu-img check: %s", name, text)
			}
		}
		if r := runQemuImg(t, "compare", "-f", format, "-F", format, a, b); r.code != 0 {
			t.Errorf("%s: qemu-img compare: %s%s", name, r.stdout, r.stderr)
		}
	}
}

// same reports whether two files hold the same bytes.
func same(t *testing.T, a, b string) bool {
	t.Helper()
	x, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	y, err := os.ReadFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Equal(x, y)
}

// TestImgLikeQemuImg runs command lines with both programs.
func TestImgLikeQemuImg(t *testing.T) {
	fixtures := t.TempDir()
	makeImgFixtures(t, fixtures)
	for group, cases := range imgCases {
		for i, tc := range cases {
			t.Run(fmt.Sprintf("%s/%d", group, i), func(t *testing.T) {
				checkImgCase(t, fixtures, tc)
			})
		}
	}
}
