package lint

import (
	"go/ast"
	"go/token"
	"go/types"
	"path"
	"strings"
)

var offsetShifts = rule{
	name:     "offset shifts",
	sentence: "offsets are taken apart in qcow2/offset.go and qcow2/entry.go only; ask the geometry",
	check: func(t *tree, found func(at, what string)) {
		checker := &typeChecker{tree: t, packages: map[string]*types.Package{}}
		for dir, files := range t.packages() {
			if area(dir) != "qcow2" {
				continue
			}
			info := &types.Info{Types: map[ast.Expr]types.TypeAndValue{}}
			checker.check(dir, files, info)
			for _, f := range files {
				if f.test() || f.path == "qcow2/offset.go" || f.path == "qcow2/entry.go" {
					continue
				}
				ast.Inspect(f.ast, func(n ast.Node) bool {
					e, ok := n.(*ast.BinaryExpr)
					if ok && (e.Op == token.SHL || e.Op == token.SHR) && isOffset(info, e.X) {
						found(t.at(e.Pos()), "shift of an offset")
					}
					return true
				})
			}
		}
	},
}

// isOffset reports whether e is a HostOffset or a GuestOffset, also one that
// is converted to another type on the spot.
func isOffset(info *types.Info, e ast.Expr) bool {
	for {
		if named, ok := types.Unalias(info.TypeOf(e)).(*types.Named); ok {
			if name := named.Obj().Name(); name == "HostOffset" || name == "GuestOffset" {
				return true
			}
		}
		switch x := e.(type) {
		case *ast.ParenExpr:
			e = x.X
		case *ast.CallExpr:
			if len(x.Args) != 1 || !info.Types[x.Fun].IsType() {
				return false
			}
			e = x.Args[0]
		default:
			return false
		}
	}
}

// A typeChecker finds the types of the tree's own packages. Packages from
// outside are empty to it and what depends on them has no type: enough to know
// an offset, without the time and the tools that real imports need.
type typeChecker struct {
	tree     *tree
	packages map[string]*types.Package // by import path
}

func (c *typeChecker) check(dir string, files []*file, info *types.Info) *types.Package {
	var asts []*ast.File
	for _, f := range files {
		if !f.test() {
			asts = append(asts, f.ast)
		}
	}
	conf := types.Config{Importer: c, Error: func(error) {}} // go vet reports errors
	pkg, _ := conf.Check(module+"/"+dir, c.tree.fset, asts, info)
	return pkg
}

// Import implements types.Importer.
func (c *typeChecker) Import(imported string) (*types.Package, error) {
	if pkg := c.packages[imported]; pkg != nil {
		return pkg, nil
	}
	pkg := types.NewPackage(imported, path.Base(imported))
	if dir, ours := strings.CutPrefix(imported, module+"/"); ours {
		if files := c.tree.packages()[dir]; files != nil {
			pkg = c.check(dir, files, &types.Info{})
		}
	}
	pkg.MarkComplete()
	c.packages[imported] = pkg
	return pkg, nil
}
