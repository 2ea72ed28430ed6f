package lint

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// module is the path of the main module.
const module = "csi-qcow2"

// A file is one text file of the tree.
type file struct {
	path string // slash separated, relative to the root
	text []byte
	ast  *ast.File // nil if it is not a Go file of the main module
}

func (f *file) dir() string  { return path.Dir(f.path) }
func (f *file) test() bool   { return strings.HasSuffix(f.path, "_test.go") }
func (f *file) area() string { return area(f.dir()) }

// area returns the area of the package in directory dir.
func area(dir string) string {
	first, rest, _ := strings.Cut(dir, "/")
	if first == "internal" && rest != "" {
		second, _, _ := strings.Cut(rest, "/")
		return first + "/" + second
	}
	return first
}

// A tree is what the rules look at.
type tree struct {
	fset  *token.FileSet
	files []*file // by path
}

// newTree parses the files of text by path. Go files below one of nested, the
// directories of other modules, are text only.
func newTree(texts map[string][]byte, nested []string) (*tree, error) {
	t := &tree{fset: token.NewFileSet()}
	for name, text := range texts {
		f := &file{path: name, text: text}
		inNested := slices.ContainsFunc(nested, func(dir string) bool { return strings.HasPrefix(name, dir+"/") })
		if strings.HasSuffix(name, ".go") && !inNested {
			var err error
			if f.ast, err = parser.ParseFile(t.fset, name, text, parser.ParseComments|parser.SkipObjectResolution); err != nil {
				return nil, err
			}
		}
		t.files = append(t.files, f)
	}
	slices.SortFunc(t.files, func(a, b *file) int { return strings.Compare(a.path, b.path) })
	return t, nil
}

// loadTree reads the files below root that git knows or would add, whoever owns the tree.
func loadTree(root string) (*tree, error) {
	git := exec.Command("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	git.Dir = root
	names, err := git.Output()
	if err != nil {
		return nil, fmt.Errorf("git ls-files in %q: %w", root, err)
	}
	texts := map[string][]byte{}
	var nested []string
	for name := range strings.SplitSeq(strings.TrimRight(string(names), "\x00"), "\x00") {
		text, err := os.ReadFile(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // deleted, but git still lists it
		}
		if err != nil {
			return nil, err
		}
		if bytes.IndexByte(text, 0) >= 0 {
			continue // an image or another binary file
		}
		texts[name] = text
		if path.Base(name) == "go.mod" && path.Dir(name) != "." {
			nested = append(nested, path.Dir(name))
		}
	}
	return newTree(texts, nested)
}

// goFiles calls visit for each Go file of the main module.
func (t *tree) goFiles(visit func(*file)) {
	for _, f := range t.files {
		if f.ast != nil {
			visit(f)
		}
	}
}

// packages returns the Go files of the main module by directory.
func (t *tree) packages() map[string][]*file {
	packages := map[string][]*file{}
	t.goFiles(func(f *file) { packages[f.dir()] = append(packages[f.dir()], f) })
	return packages
}

// at returns where pos is, for a finding.
func (t *tree) at(pos token.Pos) string {
	p := t.fset.Position(pos)
	return fmt.Sprintf("%s:%d", p.Filename, p.Line)
}
