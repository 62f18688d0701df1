package publish

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hallmark-id/hallmark/server/oidc"
)

const (
	// MaxTargets is how many targets a server may have.
	MaxTargets = 20
	// maxIssuers is how many issuers one target may have.
	maxIssuers = 20
	// maxName bounds the path of a document in a target, in bytes: clouds take
	// about 1000, with their prefix.
	maxName = 500
	maxPath = 4096 // bytes of a directory's path
)

// Config is a target: a place where others fetch documents from, such as the root
// of a web server. What is published is public by nature; it has no secrets.
type Config struct {
	// Name is the target's, in metrics, the log and "hallmark publish list": small
	// letters, digits and hyphens. It is required.
	Name string `yaml:"name" env:"expand"`
	// Bundle is the path of the SPIFFE bundle document in the target, for example
	// bundle.json. Default: it is not published there.
	Bundle string `yaml:"bundle" env:"expand"`
	// Issuers are those of JWT-SVIDs whose OpenID Connect documents are published.
	// Default: none.
	Issuers []IssuerConfig `yaml:"issuers"`

	Directory *DirectoryConfig `yaml:"directory"`  // files, which a web server serves
	S3        *S3Config        `yaml:"s3"`         // a bucket of Amazon S3, or of what speaks its API
	GCS       *GCSConfig       `yaml:"gcs"`        // a bucket of Google Cloud Storage
	AzureBlob *AzureBlobConfig `yaml:"azure_blob"` // a container of Azure Blob Storage
}

// IssuerConfig is an issuer of JWT-SVIDs whose documents are published.
type IssuerConfig struct {
	// URL is the https URL by which relying parties find the target, without a slash
	// at its end: the claim iss of tokens (jwt.issuer, or issuer of a profile). It is
	// required.
	URL string `yaml:"url" env:"expand"`
	// Prefix is the path in the target to which the URL leads: below it are
	// .well-known/openid-configuration and keys. Default: the URL leads to the target
	// itself.
	Prefix string `yaml:"prefix" env:"expand"`
}

// DirectoryConfig is a target of files.
type DirectoryConfig struct {
	// Path is the absolute path of a directory that is there and that the server's
	// user may write to. Files in it are readable by everybody. It is required.
	Path string `yaml:"path" env:"expand"`
}

var (
	nameForm    = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	segmentForm = regexp.MustCompile(`^[A-Za-z0-9._~-]{1,100}$`)
)

// place is where a target is.
type place interface {
	// check says what is wrong with the configuration.
	check() error
	// store makes what reads and writes there. It asks nobody anything yet.
	store(server string) store
}

// places returns those that are configured, and their names.
func (c *Config) places() (all []place, names []string) {
	if c.Directory != nil {
		all, names = append(all, c.Directory), append(names, "directory")
	}
	if c.S3 != nil {
		all, names = append(all, c.S3), append(names, "s3")
	}
	if c.GCS != nil {
		all, names = append(all, c.GCS), append(names, "gcs")
	}
	if c.AzureBlob != nil {
		all, names = append(all, c.AzureBlob), append(names, "azure_blob")
	}
	return all, names
}

// store makes that of a target that was checked.
func (c *Config) store(server string) store {
	all, _ := c.places()
	return all[0].store(server)
}

// CheckAll checks the targets of a configuration without asking anyone. Wrong is
// called for each mistake, with the path of it below publish.
func CheckAll(targets []Config, wrong func(path string, err error)) {
	if n := len(targets); n > MaxTargets {
		wrong("", fmt.Errorf("publish has %d targets; the most is %d", n, MaxTargets))
	}
	names := make(map[string]bool)
	places := make(map[string]string) // of documents, to the targets that have them
	for i, c := range targets {
		at := strconv.Itoa(i)
		switch {
		case c.Name == "":
			wrong(at, errors.New("the target has no name; set name to one like web"))
		case !nameForm.MatchString(c.Name):
			wrong(at+".name", fmt.Errorf("%.80q is no name of a target; it has at most 63 small letters, digits and hyphens, like web", c.Name))
		case names[c.Name]:
			wrong(at+".name", fmt.Errorf("two targets have the name %s; give each its own", c.Name))
		}
		names[c.Name] = true
		path, err := c.check()
		if err != nil {
			wrong(strings.TrimSuffix(at+"."+path, "."), err)
			continue
		}
		place := c.store("").String()
		for _, d := range c.paths() {
			if other, twice := places[place+"/"+d]; twice {
				wrong(at, fmt.Errorf("the targets %s and %s both publish %s; give each a place of its own", other, c.Name, d))
			}
			places[place+"/"+d] = c.Name
		}
	}
}

// check finds what cannot be meant. The path is that of what is wrong.
func (c *Config) check() (path string, err error) {
	places, kinds := c.places()
	switch {
	case len(kinds) == 0:
		return "", errors.New("the target names no place; set directory, s3, gcs or azure_blob")
	case len(kinds) > 1:
		return "", fmt.Errorf("the target names %s; choose one, or make two targets", strings.Join(kinds, " and "))
	case c.Bundle == "" && len(c.Issuers) == 0:
		return "", errors.New("the target has nothing to publish; set bundle to a path like bundle.json, or issuers")
	case len(c.Issuers) > maxIssuers:
		return "issuers", fmt.Errorf("the target has %d issuers; the most is %d", len(c.Issuers), maxIssuers)
	}
	if c.Bundle != "" {
		if err := checkPath(c.Bundle); err != nil {
			return "bundle", fmt.Errorf("bundle %w; write a path like bundle.json", err)
		}
	}
	for i, issuer := range c.Issuers {
		at := "issuers." + strconv.Itoa(i)
		if issuer.URL == "" {
			return at, errors.New("the issuer has no url; write one like https://id.example.org")
		}
		if _, err := oidc.New(oidc.Options{URLs: []string{issuer.URL}}); err != nil {
			return at + ".url", err
		}
		if issuer.Prefix != "" {
			if err := checkPath(issuer.Prefix); err != nil {
				return at + ".prefix", fmt.Errorf("prefix %w; write a path like tenants/shop", err)
			}
		}
	}
	paths := c.paths()
	for i, one := range paths {
		for _, other := range paths[i+1:] {
			switch {
			case one == other:
				return "", fmt.Errorf("two documents of the target have the path %s; give each issuer a prefix of its own", one)
			case strings.HasPrefix(one, other+"/"), strings.HasPrefix(other, one+"/"):
				return "", fmt.Errorf("a document of the target has the path %s, and another %s, below it; choose other paths", one, other)
			}
		}
	}
	return kinds[0], places[0].check()
}

// paths returns those of the target's documents.
func (c *Config) paths() (paths []string) {
	for _, issuer := range c.Issuers {
		keys, metadata := issuer.paths()
		paths = append(paths, keys, metadata)
	}
	if c.Bundle != "" {
		paths = append(paths, c.Bundle)
	}
	return paths
}

func (c *IssuerConfig) paths() (keys, metadata string) {
	return strings.TrimPrefix(c.Prefix+oidc.KeysPath, "/"), strings.TrimPrefix(c.Prefix+oidc.MetadataPath, "/")
}

// checkPath checks the path of a document, or of what documents are below: it
// cannot lead out of the target, and is written in one way in URLs.
func checkPath(path string) error {
	if len(path) > maxName {
		return fmt.Errorf("is %d bytes long, and the most is %d", len(path), maxName)
	}
	for segment := range strings.SplitSeq(path, "/") {
		if !segmentForm.MatchString(segment) || segment == "." || segment == ".." {
			return fmt.Errorf("%.100q is none of letters, digits and . _ ~ -, with single slashes between them", path)
		}
	}
	return nil
}

func (c *DirectoryConfig) check() error {
	if !filepath.IsAbs(c.Path) || filepath.Clean(c.Path) != c.Path || c.Path == "/" || len(c.Path) > maxPath || slices.Contains([]byte(c.Path), 0) {
		return fmt.Errorf("directory.path is %.200q; write the absolute path of a directory, like /srv/www/id", c.Path)
	}
	return nil
}

func (c *DirectoryConfig) store(server string) store { return &directory{*c, server} }
