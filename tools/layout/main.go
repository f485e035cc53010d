// Command layout checks the dependencies between the files of the engine's package. It
// fails if they have a cycle or violate the declared order, or if the package comment in
// backend.go lists other files than order.txt.
//
//	go run ./tools/layout        the counts, and every violation
//	go run ./tools/layout -v     also the names behind each arrow
//
// The package is flat, so the compiler does not enforce an order in it. This program
// type-checks the package and records an arrow from the file that uses a name to the file
// that declares it. order.txt declares the order of the files, from those that use others
// to those that are used, so that the package can be read from top to bottom. Arrows to
// the backend's type and arrows from backend.go do not count: backend.go declares the type
// of most methods, and wires the other files together.
package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
)

//go:embed order.txt
var declared string

// The file that declares the backend and wires everything together.
const wiring = "backend.go"

func main() {
	verbose := flag.Bool("v", false, "print the names behind each arrow that breaks the order")
	all := flag.Bool("all", false, "print every arrow with its names")
	flag.Parse()
	arrows, files, err := load(".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "layout:", err)
		os.Exit(2)
	}
	comment, err := commented(wiring)
	if err != nil {
		fmt.Fprintln(os.Stderr, "layout:", err)
		os.Exit(2)
	}
	good := report(os.Stdout, arrows, files, order(declared), *verbose, *all)
	if want := order(declared); !slices.Equal(comment, want) {
		fmt.Printf("the package comment in %s lists\n    %s\nbut order.txt\n    %s\n", wiring, strings.Join(comment, " "), strings.Join(want, " "))
		good = false
	}
	if !good {
		os.Exit(1)
	}
}

// commented returns the files that the package comment of a file lists, in its order.
func commented(path string) ([]string, error) {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.PackageClauseOnly)
	if err != nil {
		return nil, err
	}
	return listedIn(file.Doc.Text()), nil
}

// listedIn reads the items of a comment's list: a title, a colon, and names of files
// without ".go".
func listedIn(comment string) []string {
	var files []string
	item := false
	for line := range strings.Lines(comment) {
		if title, names, found := strings.Cut(line, ": "); found && strings.HasPrefix(title, "  - ") {
			item, line = true, names
		} else if item = item && strings.HasPrefix(line, "    "); !item {
			continue
		}
		for name := range strings.SplitSeq(strings.Trim(line, " ,;.\n"), ", ") {
			files = append(files, name+".go")
		}
	}
	return files
}

// order reads the list of files: one per line; '#' starts a comment.
func order(text string) []string {
	var files []string
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line != "" {
			files = append(files, line)
		}
	}
	return files
}

// arrows maps each file to the files that it uses and the names that it uses there.
type arrows map[string]map[string][]string

func (a arrows) add(from, to, name string) {
	if a[from] == nil {
		a[from] = map[string][]string{}
	}
	if !slices.Contains(a[from][to], name) {
		a[from][to] = append(a[from][to], name)
	}
}

// load type-checks the package in the folder, without its tests, and returns
// its files and the arrows between them.
func load(dir string) (arrows, []string, error) {
	pkg, exports, err := list(dir)
	if err != nil {
		return nil, nil, err
	}
	fset := token.NewFileSet()
	var parsed []*ast.File
	for _, name := range pkg.GoFiles {
		file, err := parser.ParseFile(fset, filepath.Join(pkg.Dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, nil, err
		}
		parsed = append(parsed, file)
	}
	open := func(path string) (io.ReadCloser, error) {
		file, ok := exports[path]
		if !ok {
			return nil, fmt.Errorf("no export data for %s", path)
		}
		return os.Open(file)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	config := types.Config{Importer: importer.ForCompiler(fset, "gc", open)}
	checked, err := config.Check(pkg.ImportPath, fset, parsed, info)
	if err != nil {
		return nil, nil, err
	}
	found := arrows{}
	for ident, object := range info.Uses {
		if object.Pkg() != checked {
			continue
		}
		from := filepath.Base(fset.Position(ident.Pos()).Filename)
		to := filepath.Base(fset.Position(object.Pos()).Filename)
		if from == to || from == wiring || isBackend(object, checked) {
			continue
		}
		found.add(from, to, object.Name())
	}
	return found, pkg.GoFiles, nil
}

// isBackend reports whether a name is the backend's type or one of its fields, which every
// file may use.
func isBackend(object types.Object, pkg *types.Package) bool {
	backend := pkg.Scope().Lookup("backend")
	if backend == nil {
		return false
	}
	if object == backend {
		return true
	}
	fields, ok := backend.Type().Underlying().(*types.Struct)
	if !ok {
		return false
	}
	for field := range fields.Fields() {
		if object == field {
			return true
		}
	}
	return false
}

type listed struct {
	Dir, ImportPath, Export string
	GoFiles                 []string
	DepOnly                 bool
}

// list gets the package's files and the export data of its imports from the go command.
func list(dir string) (listed, map[string]string, error) {
	command := exec.Command("go", "list", "-export", "-deps", "-json=Dir,ImportPath,Export,GoFiles,DepOnly", ".")
	command.Dir = dir
	var out, complaint bytes.Buffer
	command.Stdout, command.Stderr = &out, &complaint
	if err := command.Run(); err != nil {
		return listed{}, nil, fmt.Errorf("go list: %w\n%s", err, complaint.String())
	}
	var root listed
	exports := map[string]string{}
	for decoder := json.NewDecoder(&out); ; {
		var pkg listed
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			return root, exports, nil
		} else if err != nil {
			return listed{}, nil, err
		}
		exports[pkg.ImportPath] = pkg.Export
		if !pkg.DepOnly {
			root = pkg
		}
	}
}

// report prints the result, and returns whether the order holds.
func report(out io.Writer, found arrows, files, declared []string, verbose, all bool) bool {
	rank := map[string]int{}
	for i, file := range declared {
		rank[file] = i
	}
	good := true
	var count int
	var up, pairs []string
	line := func(from, to string) string {
		text := from + " -> " + to
		if verbose || all {
			names := slices.Sorted(slices.Values(found[from][to]))
			text += ": " + strings.Join(names, " ")
		}
		return text
	}
	for _, from := range files {
		if from == wiring {
			continue
		}
		for _, to := range sorted(found[from]) {
			count++
			if all {
				fmt.Fprintln(out, line(from, to))
			}
			if rank[to] < rank[from] {
				up = append(up, line(from, to))
			}
			if from < to && found[to][from] != nil {
				pairs = append(pairs, line(from, to)+"\n    "+line(to, from))
			}
		}
	}
	var circles [][]string
	for _, component := range components(found, files) {
		if len(component) > 1 {
			circles = append(circles, component)
		}
	}
	fmt.Fprintf(out, "%d files, %d arrows, %d pairs that use each other, %d circles, %d arrows against the order\n",
		len(files), count, len(pairs), len(circles), len(up))
	for _, file := range files {
		if _, ok := rank[file]; !ok && file != wiring {
			fmt.Fprintf(out, "not in order.txt: %s\n", file)
			good = false
		}
	}
	for _, file := range declared {
		if !slices.Contains(files, file) {
			fmt.Fprintf(out, "in order.txt, but not in the package: %s\n", file)
			good = false
		}
	}
	for _, pair := range pairs {
		fmt.Fprintln(out, "pair:", pair)
	}
	for _, circle := range circles {
		fmt.Fprintf(out, "circle of %d: %s\n", len(circle), strings.Join(circle, " "))
	}
	for _, arrow := range up {
		fmt.Fprintln(out, "against the order:", arrow)
	}
	return good && len(circles) == 0 && len(up) == 0
}

func sorted(names map[string][]string) []string {
	keys := make([]string, 0, len(names))
	for key := range names {
		keys = append(keys, key)
	}
	sort.Strings(keys)
	return keys
}

// components are the strongly connected components (Tarjan's algorithm): files
// that reach each other are in the same one.
func components(found arrows, files []string) [][]string {
	var (
		index, low = map[string]int{}, map[string]int{}
		onStack    = map[string]bool{}
		stack      []string
		result     [][]string
		visit      func(string)
	)
	visit = func(file string) {
		index[file] = len(index) + 1
		low[file] = index[file]
		stack = append(stack, file)
		onStack[file] = true
		for _, next := range sorted(found[file]) {
			if index[next] == 0 {
				visit(next)
				low[file] = min(low[file], low[next])
			} else if onStack[next] {
				low[file] = min(low[file], index[next])
			}
		}
		if low[file] != index[file] {
			return
		}
		at := slices.Index(stack, file)
		component := slices.Clone(stack[at:])
		for _, member := range component {
			onStack[member] = false
		}
		stack = stack[:at]
		slices.Sort(component)
		result = append(result, component)
	}
	for _, file := range files {
		if index[file] == 0 {
			visit(file)
		}
	}
	return result
}
