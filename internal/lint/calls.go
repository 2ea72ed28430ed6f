package lint

import "go/ast"

var exitInCmd = rule{
	name:     "exit in cmd",
	sentence: "only cmd, and the programs in bench, end the process; everything else returns an error",
	check: func(t *tree, found func(at, what string)) {
		t.eachCall(func(f *file, call *ast.CallExpr, _ []ast.Node) {
			if f.area() == "cmd" || f.area() == "bench" || f.test() {
				return
			}
			switch name := callee(call); name {
			case "os.Exit", "log.Fatal", "log.Fatalf", "log.Fatalln", "klog.Fatal", "klog.Fatalf", "klog.Exit", "klog.Exitf":
				found(t.at(call.Pos()), name)
			}
		})
	},
}

var noContextTODO = rule{
	name:     "no context.TODO",
	sentence: "a context comes from the caller, or its absence is a decision: use context.Background or WithoutCancel and say why",
	check: func(t *tree, found func(at, what string)) {
		t.eachCall(func(_ *file, call *ast.CallExpr, _ []ast.Node) {
			if name := callee(call); name == "context.TODO" {
				found(t.at(call.Pos()), name)
			}
		})
	},
}

var noErrorText = rule{
	name:     "no error text",
	sentence: "decide by errors.Is and errors.As; the text of an error is for people",
	check: func(t *tree, found func(at, what string)) {
		t.eachCall(func(f *file, call *ast.CallExpr, _ []ast.Node) {
			if f.test() {
				return // a test may look at what people will read
			}
			switch callee(call) {
			case "strings.Contains", "strings.HasPrefix", "strings.HasSuffix", "strings.EqualFold", "strings.Index":
			default:
				return
			}
			for _, arg := range call.Args {
				inner, ok := arg.(*ast.CallExpr)
				if !ok || len(inner.Args) != 0 {
					continue
				}
				if sel, ok := inner.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == "Error" {
					found(t.at(call.Pos()), callee(call)+" of an error's text")
				}
			}
		})
	},
}

var noSilentSkip = rule{
	name:     "no silent skip",
	sentence: "a test that cannot run fails and says what to install; only testing.Short may skip",
	check: func(t *tree, found func(at, what string)) {
		t.eachCall(func(_ *file, call *ast.CallExpr, parents []ast.Node) {
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return
			}
			receiver, ok := sel.X.(*ast.Ident)
			if !ok || (receiver.Name != "t" && receiver.Name != "b" && receiver.Name != "f" && receiver.Name != "tb") {
				return
			}
			if name := sel.Sel.Name; name != "Skip" && name != "Skipf" && name != "SkipNow" {
				return
			}
			for _, parent := range parents {
				if cond, ok := parent.(*ast.IfStmt); ok && mentionsShort(cond.Cond) {
					return
				}
			}
			found(t.at(call.Pos()), receiver.Name+"."+sel.Sel.Name)
		})
	},
}

// mentionsShort reports whether e calls testing.Short.
func mentionsShort(e ast.Expr) bool {
	short := false
	ast.Inspect(e, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok && callee(call) == "testing.Short" {
			short = true
		}
		return !short
	})
	return short
}

// eachCall calls visit for each call expression with the nodes around it.
func (t *tree) eachCall(visit func(f *file, call *ast.CallExpr, parents []ast.Node)) {
	t.goFiles(func(f *file) {
		var parents []ast.Node
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if n == nil {
				parents = parents[:len(parents)-1]
				return true
			}
			if call, ok := n.(*ast.CallExpr); ok {
				visit(f, call, parents)
			}
			parents = append(parents, n)
			return true
		})
	})
}

// callee returns "package.Function" as written, or "".
func callee(call *ast.CallExpr) string {
	sel, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return ""
	}
	x, ok := sel.X.(*ast.Ident)
	if !ok {
		return ""
	}
	return x.Name + "." + sel.Sel.Name
}
