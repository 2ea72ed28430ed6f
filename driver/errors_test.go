package driver

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// TestEverySentinelHasARow reads the sources: each exported Err variable of the
// packages below must stand in codeTable, and nothing else may.
func TestEverySentinelHasARow(t *testing.T) {
	rows := make(map[string]bool)
	for _, file := range parse(t, "errors.go") {
		ast.Inspect(file, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && sentinelName.MatchString(sel.Sel.Name) {
				rows[sel.X.(*ast.Ident).Name+"."+sel.Sel.Name] = true
			}
			return true
		})
	}
	sentinels := 0
	for _, pkg := range []string{"volume", "qcow2", "nbdexport"} {
		for _, file := range parse(t, "../"+pkg+"/*.go") {
			for _, decl := range file.Decls {
				gen, ok := decl.(*ast.GenDecl)
				if !ok || gen.Tok != token.VAR {
					continue
				}
				for _, spec := range gen.Specs {
					for _, name := range spec.(*ast.ValueSpec).Names {
						if !sentinelName.MatchString(name.Name) {
							continue
						}
						sentinels++
						full := pkg + "." + name.Name
						if !rows[full] {
							t.Errorf("%s has no row in codeTable", full)
						}
						delete(rows, full)
					}
				}
			}
		}
	}
	if sentinels < 30 {
		t.Errorf("found only %d sentinels: the test does not look where they are", sentinels)
	}
	for row := range rows {
		t.Errorf("codeTable has a row for %s, which is no sentinel", row)
	}
}

// sentinelName is what exported errors are called.
var sentinelName = regexp.MustCompile(`^Err[A-Z]`)

func parse(t *testing.T, pattern string) []*ast.File {
	t.Helper()
	names, err := filepath.Glob(pattern)
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: %v, %v", pattern, names, err)
	}
	var files []*ast.File
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") && !strings.HasSuffix(pattern, name) {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	return files
}

func TestCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{errors.New("x"), codes.Internal},
		{fmt.Errorf("a: %w", fmt.Errorf("b: %w", volume.ErrBusy)), codes.Aborted},
		{errors.Join(volume.ErrNotFound, errors.New("x")), codes.NotFound},
		{fmt.Errorf("%w; %w: %w", volume.ErrNotFound, errUndo, unix.EBUSY), codes.Aborted},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{fmt.Errorf("write: %w", unix.ENOSPC), codes.ResourceExhausted},
		{nbdexport.ErrDeviceBusy, codes.Aborted},
		{status.Error(codes.Unimplemented, "x"), codes.Unimplemented},
	} {
		if got := status.Code(toStatus(c.err)); got != c.want {
			t.Errorf("%v: got %s, want %s", c.err, got, c.want)
		}
	}
}
