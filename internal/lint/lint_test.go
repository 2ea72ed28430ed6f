package lint

import (
	"strings"
	"testing"
)

// TestTree holds the rules against the tree.
func TestTree(t *testing.T) {
	tree, err := loadTree("../..")
	if err != nil {
		t.Fatal(err)
	}
	if packages := tree.packages(); len(packages) < 5 || packages["qcow2"] == nil || packages["cmd/csi-qcow2"] == nil {
		t.Fatalf("the loader sees %d packages; it looks at the wrong place", len(packages))
	}
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, line := range r.findings(tree) {
				t.Error(line)
			}
		})
	}
}

// lines returns a Go file of package p with n lines.
func lines(p string, n int) string {
	head := "// Package " + p + " is long.\npackage " + p + "\n"
	return head + strings.Repeat("// …\n", n-strings.Count(head, "\n"))
}

const offsetTypes = "package qcow2\ntype HostOffset uint64\ntype GuestOffset uint64\n"

// examples has, for each rule, trees that break it and trees that keep it.
var examples = map[string]struct{ breaks, keeps []map[string]string }{
	"imports down": {
		breaks: []map[string]string{
			{"qcow2/a.go": "package qcow2\nimport _ \"csi-qcow2/volume\""},
			{"nbdexport/a.go": "package nbdexport\nimport _ \"csi-qcow2/qcow2\""},
			{"nbdexport/a_test.go": "package nbdexport\nimport _ \"csi-qcow2/qcow2\""},
			{"volume/a.go": "package volume\nimport _ \"csi-qcow2/nbdexport\""},
			{"cache/a.go": "package cache\nimport _ \"csi-qcow2/qcow2\""},
			{"internal/durable/a.go": "package durable\nimport _ \"csi-qcow2/volume\""},
			{"internal/demo/a.go": "package demo\nimport _ \"csi-qcow2/driver\""},
			{"driver/a.go": "package driver\nimport _ \"csi-qcow2/internal/demo\""},
			{"nbdexport/a.go": "package nbdexport\nimport _ \"csi-qcow2/internal/imagebackend\""},
			{"internal/imagebackend/a.go": "package imagebackend\nimport _ \"csi-qcow2/volume\""},
		},
		keeps: []map[string]string{
			{"cmd/csi-qcow2/a.go": "package main\nimport _ \"csi-qcow2/driver\"\nimport _ \"csi-qcow2/internal/demo\""},
			{"qcow2/convert/a.go": "package convert\nimport _ \"csi-qcow2/qcow2\""},
			{"volume/a.go": "package volume\nimport _ \"csi-qcow2/internal/durable\""},
		},
	},
	"imports outside": {
		breaks: []map[string]string{
			{"volume/a.go": "package volume\nimport _ \"google.golang.org/grpc/codes\""},
			{"volume/a.go": "package volume\nimport _ \"k8s.io/klog/v2\""},
			{"nbdexport/a.go": "package nbdexport\nimport _ \"k8s.io/mount-utils\""},
			{"qcow2/a.go": "package qcow2\nimport _ \"os/exec\""},
			{"cache/a.go": "package cache\nimport _ \"log\""},
			{"driver/a.go": "package driver\nimport _ \"github.com/spf13/cobra\""},
		},
		keeps: []map[string]string{
			{"driver/a.go": "package driver\nimport _ \"google.golang.org/grpc\"\nimport _ \"k8s.io/klog/v2\""},
			{"qcow2/a_test.go": "package qcow2\nimport _ \"os/exec\""},
			{"qcow2/a.go": "package qcow2\nimport _ \"login\""},
		},
	},
	"test helpers": {
		breaks: []map[string]string{{"qcow2/a.go": "package qcow2\nimport _ \"csi-qcow2/internal/storagetest\""}},
		keeps: []map[string]string{
			{"qcow2/a_test.go": "package qcow2\nimport _ \"csi-qcow2/internal/storagetest\""},
			{"internal/qemutest/a.go": "package qemutest\nimport _ \"csi-qcow2/internal/storagetest\""},
		},
	},
	"exit in cmd": {
		breaks: []map[string]string{{"driver/a.go": "package driver\nimport \"os\"\nfunc f() { os.Exit(1) }"}},
		keeps:  []map[string]string{{"cmd/csi-qcow2/a.go": "package main\nimport \"os\"\nfunc f() { os.Exit(1) }"}},
	},
	"no context.TODO": {
		breaks: []map[string]string{{"driver/a.go": "package driver\nimport \"context\"\nvar c = context.TODO()"}},
		keeps:  []map[string]string{{"driver/a.go": "package driver\nimport \"context\"\nvar c = context.Background()"}},
	},
	"no error text": {
		breaks: []map[string]string{{"volume/a.go": "package volume\nimport \"strings\"\nfunc f(err error) bool { return strings.Contains(err.Error(), \"busy\") }"}},
		keeps: []map[string]string{
			{"volume/a.go": "package volume\nimport \"strings\"\nfunc f(s string) bool { return strings.Contains(s, \"busy\") }"},
			{"volume/a_test.go": "package volume\nimport \"strings\"\nfunc f(err error) bool { return strings.Contains(err.Error(), \"busy\") }"},
		},
	},
	"no silent skip": {
		breaks: []map[string]string{{"qcow2/a_test.go": "package qcow2\nimport \"testing\"\nfunc TestA(t *testing.T) { if true { t.Skip(\"no qemu-img\") } }"}},
		keeps: []map[string]string{
			{"qcow2/a_test.go": "package qcow2\nimport \"testing\"\nfunc TestA(t *testing.T) { if testing.Short() { t.Skip(\"long\") } }"},
			{"qcow2/a.go": "package qcow2\ntype reader struct{}\nfunc (r reader) Skip() {}\nfunc f(r reader) { r.Skip() }"},
		},
	},
	"package doc": {
		breaks: []map[string]string{
			{"cache/a.go": "package cache"},
			{"cache/a.go": "// Caches things.\npackage cache"},
			{"cmd/x/main.go": "// Runs.\npackage main"},
		},
		keeps: []map[string]string{
			{"cache/doc.go": "// Package cache keeps tables.\npackage cache", "cache/a.go": "package cache"},
			{"cmd/x/main.go": "// Command x runs.\npackage main"},
		},
	},
	"offset shifts": {
		breaks: []map[string]string{
			{"qcow2/offset.go": offsetTypes, "qcow2/map.go": "package qcow2\nfunc f(o HostOffset) HostOffset { return o >> 9 }"},
			{"qcow2/offset.go": offsetTypes, "qcow2/map.go": "package qcow2\nfunc f(o GuestOffset) int64 { return int64(o) >> 16 }"},
			{"qcow2/offset.go": offsetTypes, "qcow2/convert/a.go": "package convert\nimport \"csi-qcow2/qcow2\"\nfunc f(o qcow2.HostOffset) uint64 { return uint64(o) << 1 }"},
		},
		keeps: []map[string]string{
			{"qcow2/offset.go": offsetTypes + "func (o HostOffset) sector() uint64 { return uint64(o) >> 9 }"},
			{"qcow2/offset.go": offsetTypes, "qcow2/map.go": "package qcow2\nfunc f(n uint64) uint64 { return n >> 9 }"},
		},
	},
	"file length": {
		breaks: []map[string]string{{"cache/a.go": lines("cache", maxLines+1)}},
		keeps:  []map[string]string{{"cache/a.go": lines("cache", maxLines)}, {"cache/a_test.go": lines("cache", 2*maxLines)}},
	},
	"todo has issue": {
		breaks: []map[string]string{{"a.md": "TODO: write"}, {"cache/a.go": "package cache // FIXME"}, {"a.md": "TODO(#1): x, TODO y"}},
		keeps:  []map[string]string{{"a.md": "TODO(#12): write"}, {"a.md": "METHODOLOGY"}},
	},
	"no hosts": {
		breaks: []map[string]string{{"a.yaml": "image: registry.k8s.io/sig-storage/x:v1"}, {"Dockerfile": "FROM docker.io/debian"}},
		keeps:  []map[string]string{{"a.yaml": "image: csi-provisioner:v6"}, {"go.mod": "require k8s.io/api v0.37.2"}},
	},
	"no machine paths": {
		breaks: []map[string]string{{"a.md": "see /work/notes"}, {"a.sh": "cd /home/me/src"}, {"a.go.txt": "\"/root/x\""}},
		keeps:  []map[string]string{{"a.md": "the pool /var/lib/csi-qcow2/work/root"}, {"a.md": "https://host/work"}},
	},
}

// TestRules shows that every rule can fail, and does not fail for nothing.
func TestRules(t *testing.T) {
	for _, r := range rules {
		example, ok := examples[r.name]
		if !ok || len(example.breaks) == 0 || len(example.keeps) == 0 {
			t.Errorf("rule %q has no examples that break and keep it", r.name)
		}
		for _, texts := range example.breaks {
			if got := r.findings(parse(t, texts)); len(got) == 0 {
				t.Errorf("rule %q finds nothing in %q", r.name, texts)
			}
		}
		for _, texts := range example.keeps {
			if got := r.findings(parse(t, texts)); len(got) != 0 {
				t.Errorf("rule %q finds %q in %q", r.name, got, texts)
			}
		}
	}
	if len(examples) != len(rules) {
		t.Errorf("%d examples for %d rules", len(examples), len(rules))
	}
}

func parse(t *testing.T, texts map[string]string) *tree {
	t.Helper()
	b := map[string][]byte{}
	for name, text := range texts {
		b[name] = []byte(text)
	}
	tree, err := newTree(b, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// TestNestedModule shows that the Go files of another module are text only.
func TestNestedModule(t *testing.T) {
	tree, err := newTree(map[string][]byte{"deploy/check/a.go": []byte("package check\nimport _ \"k8s.io/mount-utils\"")}, []string{"deploy/check"})
	if err != nil {
		t.Fatal(err)
	}
	if got := importsOutside.findings(tree); len(got) != 0 {
		t.Errorf("got %q, want nothing", got)
	}
}
