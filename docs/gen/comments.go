package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
)

const module = "github.com/hallmark-id/hallmark/"

// comments finds the comments of types and fields in the source, as they are not
// there at run time.
type comments struct {
	root   string                       // of the repository
	parsed map[string]map[string]string // by package, by "Type" and "Type.Field"
}

// of returns the comment of a type, or of one of its fields.
func (c *comments) of(t reflect.Type, field string) (string, error) {
	name := t.Name()
	if field != "" {
		name += "." + field
	}
	docs, err := c.parse(t.PkgPath())
	if err != nil {
		return "", err
	}
	if docs[name] == "" {
		return "", fmt.Errorf("%s.%s has no comment; its comment is its manual", t.PkgPath(), name)
	}
	return docs[name], nil
}

func (c *comments) parse(pkg string) (map[string]string, error) {
	if docs := c.parsed[pkg]; docs != nil {
		return docs, nil
	}
	paths, err := filepath.Glob(filepath.Join(c.root, strings.TrimPrefix(pkg, module), "*.go"))
	if err != nil {
		return nil, err
	}
	docs := make(map[string]string)
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		if err := collectFile(docs, path); err != nil {
			return nil, err
		}
	}
	if c.parsed == nil {
		c.parsed = make(map[string]map[string]string)
	}
	c.parsed[pkg] = docs
	return docs, nil
}

// collectFile takes the comments of the types that a file declares.
func collectFile(docs map[string]string, path string) error {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return err
	}
	for _, d := range file.Decls {
		if g, ok := d.(*ast.GenDecl); ok && g.Tok == token.TYPE {
			collect(docs, g)
		}
	}
	return nil
}

// collect takes the comments of the types that a declaration declares.
func collect(docs map[string]string, g *ast.GenDecl) {
	for _, s := range g.Specs {
		spec := s.(*ast.TypeSpec)
		doc := spec.Doc
		if doc == nil {
			doc = g.Doc
		}
		docs[spec.Name.Name] = doc.Text()
		st, ok := spec.Type.(*ast.StructType)
		if !ok {
			continue
		}
		for _, f := range st.Fields.List {
			text := f.Doc.Text()
			if text == "" {
				text = f.Comment.Text() // behind it, on the same line
			}
			for _, n := range f.Names {
				docs[spec.Name.Name+"."+n.Name] = text
			}
		}
	}
}

// key is a key of a configuration, with all that is to be said of it. The root
// is one without a name.
type key struct {
	name, path string
	typ        reflect.Type // never a pointer
	tag        reflect.StructTag
	optional   bool   // a section that may be there or not, which is a difference
	meaning    string // without what follows
	standard   string // the default: a value, or if prose is set, what it is in words
	prose      bool
	about      string // of a section: the comment of its type
	oneOf      bool   // of a section: one of its keys is set
	keys       []*key // of a section, and of a list of sections
}

// tree reads a configuration's type. The value has the defaults, which are
// compared to what the comments say.
func (c *comments) tree(defaults reflect.Value) (*key, error) {
	root := &key{typ: defaults.Type()}
	return root, c.section(root, defaults)
}

// oneOfThem is what the comment of a section says that wants one of its keys.
const oneOfThem = "one of its fields is set"

func (c *comments) section(k *key, v reflect.Value) error {
	about, err := c.of(k.typ, "")
	if err != nil {
		return err
	}
	about = plain(about)
	k.oneOf = strings.Contains(about, oneOfThem)
	if rest, ok := strings.CutPrefix(about, k.typ.Name()+" "); ok {
		about = cmp.Or(k.path, "This") + " " + rest
	}
	k.about = strings.NewReplacer(oneOfThem, "one of its keys is set", "The zero value is", "An empty section is").Replace(about)
	for i := range k.typ.NumField() {
		f := k.typ.Field(i)
		name, option, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		var value reflect.Value
		if v.IsValid() {
			value = v.Field(i)
		}
		switch {
		case option == "inline":
			inlined := &key{typ: f.Type, path: k.path}
			if err := c.section(inlined, value); err != nil {
				return err
			}
			k.keys = append(k.keys, inlined.keys...)
			continue
		case name == "", name == "-", !f.IsExported():
			continue
		}
		child := &key{name: name, path: strings.TrimPrefix(k.path+"."+name, "."), typ: f.Type, tag: f.Tag}
		if err := c.field(child, k.typ, f, value); err != nil {
			return err
		}
		k.keys = append(k.keys, child)
	}
	return nil
}

func (c *comments) field(k *key, in reflect.Type, f reflect.StructField, v reflect.Value) error {
	text, err := c.of(in, f.Name)
	if err != nil {
		return err
	}
	k.describe(f.Name, text)
	if k.typ.Kind() == reflect.Pointer {
		k.optional, k.typ, v = true, k.typ.Elem(), reflect.Value{}
	}
	if err := k.checkDefault(v); err != nil {
		return err
	}
	inner := k.typ
	if inner.Kind() == reflect.Slice || inner.Kind() == reflect.Map {
		inner, v = inner.Elem(), reflect.Value{}
	}
	if inner.Kind() != reflect.Struct || readsText(inner) {
		return nil
	}
	items := &key{typ: inner, path: k.path}
	if err := c.section(items, v); err != nil {
		return err
	}
	k.keys, k.about, k.oneOf = items.keys, items.about, items.oneOf
	return nil
}

var (
	defaultSentence = regexp.MustCompile(`(?:^| )Default(:?) (.+?)[.](?: |$)`)
	link            = regexp.MustCompile(`\[([A-Za-z.]+)\]`)
	paragraph       = regexp.MustCompile(`\n\n+`)
)

// describe takes the comment of a field apart: what it means, and a last
// sentence "Default VALUE." or "Default: in words."
func (k *key) describe(field, text string) {
	text = plain(text)
	if rest, ok := strings.CutPrefix(text, field+" "); ok {
		text = k.name + " " + rest
	}
	if m := defaultSentence.FindStringSubmatchIndex(text); m != nil {
		k.prose, k.standard = m[2] < m[3], text[m[4]:m[5]]
		if value, more, ok := strings.Cut(k.standard, ", "); ok && !k.prose {
			k.standard = value // "Default 1073741824, 1 GiB."
			text = text[:m[0]] + " (" + more + " by default) " + text[m[1]:]
		} else {
			text = text[:m[0]] + " " + text[m[1]:]
		}
	}
	k.meaning = strings.TrimSpace(text)
}

// plain makes one line of each paragraph of a comment, and text of its links.
func plain(text string) string {
	paragraphs := paragraph.Split(strings.TrimSpace(text), -1)
	for i, p := range paragraphs {
		paragraphs[i] = link.ReplaceAllString(strings.Join(strings.Fields(p), " "), "$1")
	}
	return strings.Join(paragraphs, "\n\n")
}

// checkDefault fails if the code has another default than the comment names. A
// zero value says nothing: what is behind it is decided where it is used.
func (k *key) checkDefault(v reflect.Value) error {
	if !v.IsValid() || v.IsZero() || v.Kind() == reflect.Struct {
		return nil
	}
	if got := fmt.Sprint(v.Interface()); got != k.standard || k.prose {
		return fmt.Errorf("the default of %s is %s; its comment must end with \"Default %s.\"", k.path, got, got)
	}
	return nil
}
