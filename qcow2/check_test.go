package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/qcow2"
)

// checkPath runs CheckFile on the image at path.
func checkPath(t testing.TB, path string, o qcow2.CheckOptions) (qcow2.CheckResult, []qcow2.Problem, error) {
	t.Helper()
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, f)
	var found []qcow2.Problem
	o.Report = func(p qcow2.Problem) { found = append(found, p) }
	r, err := qcow2.CheckFile(t.Context(), f, o)
	return r, found, err
}

// counted is the part of a result that qemu-img prints.
func counted(r qcow2.CheckResult) qemutest.CheckResult {
	return qemutest.CheckResult{
		Corruptions: r.Corruptions, Leaks: r.Leaks, CheckErrors: r.CheckErrors,
		ImageEndOffset: r.ImageEndOffset, TotalClusters: r.TotalClusters, AllocatedClusters: r.AllocatedClusters,
		FragmentedClusters: r.FragmentedClusters, CompressedClusters: r.CompressedClusters,
	}
}

// messages returns what is printed for each problem.
func messages(found []qcow2.Problem) []string {
	var list []string
	for _, p := range found {
		list = append(list, p.Msg)
	}
	return list
}

// findings returns the lines of qemu-img check's text that name a problem.
func findings(text string) []string {
	var list []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		for _, start := range []string{"ERROR", "Leaked", "Repairing", "Rebuilding", "Use qemu-img"} {
			if strings.HasPrefix(line, start) {
				list = append(list, line)
			}
		}
	}
	return list
}

// A testImage is a small image that qemu-img and qemu-io have made.
type testImage struct {
	name string
	make func(t testing.TB, path string)
}

// testImages covers what an image can hold: every kind of entry, snapshots,
// bitmaps, both versions, small and large clusters, all refcount widths.
func testImages() []testImage {
	fill := func(t testing.TB, path string) {
		qemutest.IO(t, path, "write -P 1 0 300k", "write -z 512k 64k", "write -z -u 640k 64k", "write -P 2 1M 100k",
			"write -P 3 1900k 20k", "discard 64k 64k")
	}
	create := func(opts ...string) func(t testing.TB, path string) {
		return func(t testing.TB, path string) {
			qemutest.Create(t, path, 2<<20, opts...)
			fill(t, path)
		}
	}
	list := []testImage{
		{"default", create()},
		{"v2", create("compat=0.10")},
		{"empty", func(t testing.TB, path string) { qemutest.Create(t, path, 2<<20) }},
		{"size0", func(t testing.TB, path string) { qemutest.Create(t, path, 0) }},
		{"clusters512", create("cluster_size=512")},
		{"clusters4k", create("cluster_size=4096")},
		{"clusters2M", create("cluster_size=2M")},
		{"metadata", create("cluster_size=4096", "preallocation=metadata")},
		{"lazy", create("lazy_refcounts=on")},
		{"snapshots", func(t testing.TB, path string) {
			create("cluster_size=4096")(t, path)
			qemutest.Img(t, "snapshot", "-c", "one", path)
			qemutest.IO(t, path, "write -P 7 100k 300k")
			qemutest.Img(t, "snapshot", "-c", "two", path)
			qemutest.IO(t, path, "write -P 8 1M 10k", "write -z 0 12k")
			qemutest.Img(t, "snapshot", "-c", "three", path)
			qemutest.Img(t, "snapshot", "-d", "two", path)
			qemutest.IO(t, path, "write -P 9 200k 500k")
		}},
		{"bitmaps", func(t testing.TB, path string) {
			create("cluster_size=4096")(t, path)
			qemutest.Img(t, "bitmap", "--add", "--enable", path, "b0")
			qemutest.Img(t, "bitmap", "--add", "-g", "512", path, "b1")
			qemutest.IO(t, path, "write -P 7 100k 300k")
		}},
	}
	for _, kind := range []string{"zlib", "zstd"} {
		list = append(list, testImage{"compressed-" + kind, func(t testing.TB, path string) {
			raw := path + ".raw"
			text := make([]byte, 3<<20)
			for i := range text {
				text[i] = byte(i/1000) ^ byte(i%7)
			}
			if err := os.WriteFile(raw, text, 0o600); err != nil {
				t.Fatal(err)
			}
			qemutest.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+kind, raw, path)
			qemutest.IO(t, path, "write -P 5 128k 64k")
		}})
	}
	for _, width := range []int{1, 2, 4, 8, 32, 64} {
		list = append(list, testImage{fmt.Sprintf("refcount%d", width), func(t testing.TB, path string) {
			create("cluster_size=1024", fmt.Sprintf("refcount_bits=%d", width))(t, path)
			if width > 1 {
				qemutest.Img(t, "snapshot", "-c", "one", path)
				qemutest.IO(t, path, "write -P 9 100k 30k")
			}
		}})
	}
	return list
}

func TestCheckCleanAgreesWithQemu(t *testing.T) {
	for _, im := range testImages() {
		t.Run(im.name, func(t *testing.T) {
			path := filepath.Join(scratch(t), "im.qcow2")
			im.make(t, path)
			want, text := qemutest.Judge(t, path)
			got, found, err := checkPath(t, path, qcow2.CheckOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if counted(got) != want {
				t.Errorf("got  %+v\nwant %+v\n%s\n%s", counted(got), want, strings.Join(messages(found), "\n"), text)
			}
			if len(found) > 0 {
				t.Errorf("findings in a clean image: %q", messages(found))
			}
		})
	}
}

// An editor pokes into an image.
type editor struct {
	t testing.TB
	f qcow2.File
}

func edit(t testing.TB, path string, fn func(e editor)) {
	t.Helper()
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer mustClose(t, f)
	fn(editor{t, f})
}

func (e editor) read(off uint64, n int) uint64 {
	b := make([]byte, 8)
	if _, err := e.f.ReadAt(b[8-n:], int64(off)); err != nil && err != io.EOF {
		e.t.Fatal(err)
	}
	return binary.BigEndian.Uint64(b)
}

func (e editor) write(off uint64, n int, v uint64) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	e.put(off, b[8-n:])
}

func (e editor) put(off uint64, b []byte) {
	if _, err := e.f.WriteAt(b, int64(off)); err != nil {
		e.t.Fatal(err)
	}
}

func (e editor) truncate(size uint64) {
	if err := e.f.Truncate(int64(size)); err != nil {
		e.t.Fatal(err)
	}
}

const offsetMask = 0x00fffffffffffe00

func (e editor) clusterSize() uint64 { return 1 << e.read(20, 4) }
func (e editor) l1() uint64          { return e.read(40, 8) }
func (e editor) reftable() uint64    { return e.read(48, 8) }
func (e editor) l2() uint64          { return e.read(e.l1(), 8) & offsetMask }
func (e editor) refblock() uint64    { return e.read(e.reftable(), 8) }
func (e editor) size() uint64 {
	n, err := e.f.Size()
	if err != nil {
		e.t.Fatal(err)
	}
	return uint64(n)
}

// entry returns the offset of the n-th L2 entry of the first table that ok accepts.
func (e editor) entry(n int, ok func(v uint64) bool) uint64 {
	for i := range e.clusterSize() / 8 {
		if off := e.l2() + i*8; ok(e.read(off, 8)) {
			if n == 0 {
				return off
			}
			n--
		}
	}
	e.t.Fatal("no such L2 entry")
	return 0
}

func isData(v uint64) bool { return v&offsetMask != 0 && v&1 == 0 && v>>62&1 == 0 }

// pokes are faults in the manner of QEMU's iotests 060, 080, 108, 138, 214 and 261.
func pokes() map[string]func(e editor) {
	m := map[string]func(e editor){
		"leak behind the end": func(e editor) {
			end := (e.size() + e.clusterSize() - 1) / e.clusterSize()
			e.write(end*e.clusterSize(), 8, 0)
			e.write(e.refblock()+end*2, 2, 1)
		},
		"leak of a higher count": func(e editor) { e.write(e.refblock()+e.l2()/e.clusterSize()*2, 2, 3) },
		"refcount of data 0": func(e editor) {
			e.write(e.refblock()+(e.read(e.entry(0, isData), 8)&offsetMask)/e.clusterSize()*2, 2, 0)
		},
		"refcount of the L2 0":     func(e editor) { e.write(e.refblock()+e.l2()/e.clusterSize()*2, 2, 0) },
		"refcount of the L1 0":     func(e editor) { e.write(e.refblock()+e.l1()/e.clusterSize()*2, 2, 0) },
		"refcount of the block 0":  func(e editor) { e.write(e.refblock()+e.refblock()/e.clusterSize()*2, 2, 0) },
		"refcount of the table 0":  func(e editor) { e.write(e.refblock()+e.reftable()/e.clusterSize()*2, 2, 0) },
		"refcount of the header 0": func(e editor) { e.write(e.refblock(), 2, 0) },
		"refcount block cleared":   func(e editor) { e.put(e.refblock(), make([]byte, e.clusterSize())) },
		"refcount table cleared":   func(e editor) { e.write(e.reftable(), 8, 0) },
		"refcount table reserved":  func(e editor) { e.write(e.reftable(), 8, e.refblock()|0x22) },
		"refcount block unaligned": func(e editor) { e.write(e.reftable(), 8, e.refblock()+512) },
		"refcount block far":       func(e editor) { e.write(e.reftable()+8, 8, e.clusterSize()*100000) },
		"refcount block twice":     func(e editor) { e.write(e.reftable()+8, 8, e.refblock()) },
		"refcount structure at the end": func(e editor) { // where a repair puts it
			e.write(e.reftable()+8, 8, e.refblock())
			if r, err := qcow2.CheckFile(e.t.Context(), e.f, qcow2.CheckOptions{RepairAll: true}); err != nil || !r.Clean() {
				e.t.Fatalf("%+v, %v", r, err)
			}
			e.write(e.reftable(), 8, e.refblock()|2)
		},
		"refcount block is data":   func(e editor) { e.write(e.reftable(), 8, e.read(e.entry(0, isData), 8)&offsetMask) },
		"refcount block is header": func(e editor) { e.write(e.reftable()+8, 8, 1<<63) },
		"L1 COPIED missing":        func(e editor) { e.write(e.l1(), 8, e.l2()) },
		"L1 reserved":              func(e editor) { e.write(e.l1(), 8, e.read(e.l1(), 8)|1<<60) },
		"L1 only COPIED":           func(e editor) { e.write(e.l1()+8, 8, 1<<63) },
		"L1 unaligned":             func(e editor) { e.write(e.l1(), 8, e.read(e.l1(), 8)|0x200) },
		"L1 beyond the end":        func(e editor) { e.write(e.l1(), 8, 1<<63|e.clusterSize()*50000) },
		"L1 twice the same":        func(e editor) { e.write(e.l1()+8, 8, e.read(e.l1(), 8)) },
		"L1 to the header":         func(e editor) { e.write(e.l1()+8, 8, 1<<63|e.l1()) },
		"L2 COPIED wrong":          func(e editor) { o := e.entry(1, isData); e.write(o, 8, e.read(o, 8)^1<<63) },
		"L2 reserved":              func(e editor) { o := e.entry(1, isData); e.write(o, 8, e.read(o, 8)|1<<58|4) },
		"L2 unaligned":             func(e editor) { o := e.entry(1, isData); e.write(o, 8, e.read(o, 8)|0x200) },
		"L2 zero unaligned":        func(e editor) { o := e.entry(1, isData); e.write(o, 8, e.read(o, 8)|0x201) },
		"L2 beyond the end":        func(e editor) { o := e.entry(1, isData); e.write(o, 8, 1<<63|e.clusterSize()*50000) },
		"L2 just beyond the end": func(e editor) {
			o := e.entry(1, isData)
			e.write(o, 8, 1<<63|(e.size()+e.clusterSize()-1)&^(e.clusterSize()-1))
		},
		"L2 twice the same": func(e editor) { e.write(e.entry(1, isData), 8, e.read(e.entry(0, isData), 8)) },
		"L2 twice the same COPIED": func(e editor) {
			copied := func(v uint64) bool { return isData(v) && v>>63 == 1 }
			e.write(e.entry(1, copied), 8, e.read(e.entry(0, copied), 8))
		},
		"L2 to the L1":             func(e editor) { e.write(e.entry(1, isData), 8, 1<<63|e.l1()) },
		"L2 to the refcount block": func(e editor) { e.write(e.entry(1, isData), 8, 1<<63|e.refblock()) },
		"L2 to the refcount table": func(e editor) { e.write(e.entry(1, isData), 8, 1<<63|e.reftable()) },
		"L2 to an L2":              func(e editor) { e.write(e.entry(1, isData), 8, 1<<63|e.l2()) },
		"L2 compressed COPIED":     func(e editor) { o := e.entry(1, isData); e.write(o, 8, e.read(o, 8)|3<<62) },
		"L2 compressed beyond":     func(e editor) { e.write(e.entry(1, isData), 8, 1<<62|e.clusterSize()*50000|77) },
		"dirty":                    func(e editor) { e.write(72, 8, e.read(72, 8)|1) },
		"dirty and refcounts stale": func(e editor) {
			e.write(72, 8, e.read(72, 8)|1)
			e.put(e.refblock()+8, make([]byte, e.clusterSize()/2))
		},
		"corrupt bit":              func(e editor) { e.write(72, 8, e.read(72, 8)|2) },
		"end cut off":              func(e editor) { e.truncate(e.size() - 3*e.clusterSize()) },
		"end cut inside a cluster": func(e editor) { e.truncate(e.size() - e.clusterSize()/2) },
		"no refcount table":        func(e editor) { e.write(56, 4, 0) },
		"refcount table is data":   func(e editor) { e.write(48, 8, e.read(e.entry(0, isData), 8)&offsetMask) },
		"snapshot L1 unaligned": func(e editor) {
			if e.read(60, 4) > 0 {
				e.write(e.read(64, 8), 8, e.read(e.read(64, 8), 8)+512)
			}
		},
		"snapshot L1 large": func(e editor) {
			if e.read(60, 4) > 0 {
				e.write(e.read(64, 8)+8, 4, 1<<30)
			}
		},
		"snapshot without disk size": func(e editor) {
			if e.read(60, 4) == 0 {
				return
			}
			// Give 16 bytes of the extra data of the first entry to its ID and name.
			s := e.read(64, 8)
			e.write(s+36, 4, 8)
			e.write(s+14, 2, e.read(s+14, 2)+16)
		},
		"snapshot L1 is the active one": func(e editor) {
			if e.read(60, 4) > 0 {
				e.write(e.read(64, 8), 8, e.l1())
			}
		},
	}
	return m
}

// pokedImages are those of testImages that the pokes fit: refcounts of 16 bits
// and an L2 table.
func pokedImages() []testImage {
	var list []testImage
	for _, im := range testImages() {
		switch im.name {
		case "default", "v2", "clusters512", "metadata", "snapshots", "bitmaps":
			list = append(list, im)
		}
	}
	return list
}

// TestCheckPokedAgreesWithQemu compares counts and words on broken images,
// and repairs them.
func TestCheckPokedAgreesWithQemu(t *testing.T) {
	for _, im := range pokedImages() {
		t.Run(im.name, func(t *testing.T) {
			t.Parallel()
			dir := scratch(t)
			sound := filepath.Join(dir, "sound.qcow2")
			im.make(t, sound)
			for name, poke := range pokes() {
				t.Run(name, func(t *testing.T) {
					path := filepath.Join(dir, "poked.qcow2")
					copyFile(t, sound, path)
					edit(t, path, poke)
					agree(t, path)
				})
			}
		})
	}
}

// qemuCheck runs qemu-img check on an image that may be broken in any way. It
// reports false if QEMU does not get as far as counting.
func qemuCheck(t testing.TB, path string, args ...string) (r qemutest.CheckResult, text string, ok bool) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command("qemu-img", append([]string{"check", "-f", "qcow2", "--output=json"}, append(args, path)...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatalf("%v; install it with \"apt-get install %s\"", err, qemutest.Package)
	}
	ok = json.Unmarshal(stdout.Bytes(), &r) == nil
	return r, stderr.String(), ok
}

// flipBits flips up to three bits in the tables of the image at path.
func flipBits(t testing.TB, path string, rng *rand.Rand) {
	t.Helper()
	edit(t, path, func(e editor) {
		for range 1 + rng.IntN(3) {
			tables := []uint64{e.l1(), e.l2(), e.reftable(), e.refblock()}
			if e.read(60, 4) > 0 {
				tables = append(tables, e.read(64, 8))
			}
			off := tables[rng.IntN(len(tables))]
			if off == 0 || off >= e.size() {
				continue // a table that an earlier flip has moved
			}
			off += uint64(rng.IntN(80))
			e.write(off, 1, e.read(off, 1)^1<<rng.IntN(8))
		}
	})
}

// mutatedImages are those of testImages that flipBits fits, and are small.
func mutatedImages() []testImage {
	return slices.DeleteFunc(testImages(), func(im testImage) bool {
		return slices.Contains([]string{"empty", "size0", "clusters2M", "lazy"}, im.name)
	})
}

func TestCheckMutatedAgreesWithQemu(t *testing.T) {
	rng := newRand(t)
	dir := scratch(t)
	sound, path := filepath.Join(dir, "sound.qcow2"), filepath.Join(dir, "mutated.qcow2")
	for _, im := range mutatedImages() {
		im.make(t, sound)
		for i := range 12 {
			copyFile(t, sound, path)
			flipBits(t, path, rng)
			agree(t, path)
			if t.Failed() {
				t.Fatalf("%s, mutation %d", im.name, i)
			}
		}
		os.Remove(sound)
	}
}

// agree compares our check with QEMU's.
func agree(t testing.TB, path string) {
	t.Helper()
	want, text, ok := qemuCheck(t, path)
	got, found, err := checkPath(t, path, qcow2.CheckOptions{})
	if !ok { // QEMU does not open it
		if err == nil && got.Clean() {
			t.Errorf("no problem found, qemu-img says\n%s", text)
		}
		return
	}
	if err != nil {
		t.Errorf("got error %v, qemu-img says\n%s", err, text)
		return
	}
	// QEMU does not look for overlaps that the refcounts allow for.
	all := len(found)
	found = slices.DeleteFunc(found, func(p qcow2.Problem) bool { return strings.HasSuffix(p.Msg, "is metadata and something else") })
	got.Corruptions -= all - len(found)
	if counted(got) != want {
		t.Errorf("\ngot  %+v\nwant %+v\n%s\nqemu-img:\n%s", counted(got), want, strings.Join(messages(found), "\n"), text)
		return
	}
	if g, w := findings(strings.Join(messages(found), "\n")), findings(text); !slices.Equal(g, w) {
		t.Errorf("\ngot\n%s\nwant\n%s", strings.Join(g, "\n"), strings.Join(w, "\n"))
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
