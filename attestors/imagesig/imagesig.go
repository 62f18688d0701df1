// Package imagesig says who signed the image of a container, by its Sigstore
// signatures: those that cosign keeps beside the image in its registry, as tags
// or as referrers. The attestors of containers make selectors of what
// [Verifier.Values] returns, named as SPIRE's are where SPIRE has them:
//
//	image-signature:verified
//	image-signature-subject:https://github.com/acme/shop/.github/workflows/release.yaml@refs/heads/main
//	image-signature-issuer:https://token.actions.githubusercontent.com
//	image-signature-value:MEUCIQ…                   the signature itself, in base64
//	image-signature-log-id:c0d23d6a…                the transparency log that has it
//	image-signature-log-index:105695637
//	image-signature-integrated-time:1719237832      Unix seconds
//	image-signature-signed-entry-timestamp:MEQCI…   the log's promise, in base64
//	image-attestations:verified
//
// and two that SPIRE does not have:
//
//	image-signature-key:release                     the name of the configured key
//	image-attestation-type:https://slsa.dev/provenance/v1
//
// What they are worth: a signature counts if one of the configured identities or
// keys made it over the very digest that the daemon or kubelet says the image
// was pulled by. An identity's must be in a transparency log of the trusted
// root. Nothing is asked but registries of images that the configuration names, and
// where those send whoever asks: whoever starts a container chooses its image, and
// must not choose what the agent talks to.
package imagesig

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"golang.org/x/sync/singleflight"
)

// Config says whose signatures of which images count.
type Config struct {
	// Images are the images whose signatures are looked for, by their name
	// without tag or digest, such as ghcr.io/acme/*: a * stands for any text, but
	// not in the registry's name. Nothing is asked of other registries. Required.
	Images []string `yaml:"images"`
	// Identities are who may have signed with a certificate of Sigstore's
	// authority (Fulcio). Default: nobody.
	Identities []Identity `yaml:"identities"`
	// TrustedRootPath is the file of the trusted root, as "cosign trusted-root
	// create" or "gh attestation trusted-root" writes it: the authorities of
	// certificates, logs and timestamps. Read anew for each image. Required with
	// identities.
	TrustedRootPath string `yaml:"trusted_root_path" env:"expand"`
	// Keys are the public keys that may have signed. Default: none.
	Keys []Key `yaml:"keys"`
	// RegistryAuthPath is a file with the passwords of registries, in the form of
	// docker's config.json; only its "auths" are read. Default: none are needed.
	RegistryAuthPath string `yaml:"registry_auth_path" env:"expand"`
	// RegistryCAPath is a PEM file of the authorities that registries'
	// certificates must lead to. Default: those of the system.
	RegistryCAPath string `yaml:"registry_ca_path" env:"expand"`
}

// Identity is who signed, as the issuer of certificates was told by an OIDC
// provider.
type Identity struct {
	// Issuer is the provider, such as
	// https://token.actions.githubusercontent.com. Required.
	Issuer string `yaml:"issuer"`
	// Subject is whom the provider named, such as
	// https://github.com/acme/shop/.github/workflows/release.yaml@refs/heads/main
	// or release@example.com: a * stands for any text. Required.
	Subject string `yaml:"subject"`
}

// Key is a public key that signs images.
type Key struct {
	// Name is what the selector calls the key. Required.
	Name string `yaml:"name"`
	// Path is the PEM file of the key, as "cosign generate-key-pair" writes it.
	// Read anew for each image. Required.
	Path string `yaml:"path" env:"expand"`
}

const (
	maxPatterns  = 100     // of a list of the configuration: more is a mistake in writing
	maxFile      = 4 << 20 // bytes of a configured file
	maxImages    = 4       // names of one image that are looked at
	maxKnown     = 4096    // images
	verifyTime   = 20 * time.Second
	waitTime     = 3 * time.Second // for the answer, of an attestation
	knownFor     = 10 * time.Minute
	knownUnknown = time.Minute      // that there is no signature that counts
	retryAfter   = 10 * time.Second // an error
)

// Verifier verifies signatures of images. Its methods may be called
// concurrently.
type Verifier struct {
	c      Config
	images []*regexp.Regexp
	allow  []verify.CertificateIdentity

	flights singleflight.Group
	mu      sync.Mutex
	known   map[string]result // by image
}

// result is what was found out of an image.
type result struct {
	until  time.Time
	values []string
	err    error
}

// New makes a verifier. It fails if a setting makes no sense, or a file of it
// cannot be read.
func New(c Config) (*Verifier, error) {
	v := &Verifier{c: c, known: make(map[string]result)}
	switch {
	case len(c.Images) == 0:
		return nil, errors.New("image_signatures.images names no image; write such as ghcr.io/acme/*")
	case len(c.Identities) == 0 && len(c.Keys) == 0:
		return nil, errors.New("image_signatures has neither identities nor keys, so that no signature could count")
	case len(c.Identities) > 0 && c.TrustedRootPath == "":
		return nil, errors.New("image_signatures.trusted_root_path is missing, which identities are verified with; \"cosign trusted-root create\" writes that file")
	case max(len(c.Images), len(c.Identities), len(c.Keys)) > maxPatterns:
		return nil, fmt.Errorf("a list of image_signatures has more than %d items", maxPatterns)
	}
	for _, pattern := range c.Images {
		registry, _, _ := strings.Cut(pattern, "/")
		if !strings.ContainsAny(registry, ".:") && registry != "localhost" || strings.Contains(registry, "*") || !strings.Contains(pattern, "/") || strings.ContainsAny(pattern, "@ ") {
			return nil, fmt.Errorf("image_signatures.images has %q; write the registry's host, a slash and the image without a tag, such as ghcr.io/acme/*", pattern)
		}
		v.images = append(v.images, glob(pattern))
	}
	for _, id := range c.Identities {
		if id.Issuer == "" || id.Subject == "" || strings.Contains(id.Issuer, "*") {
			return nil, fmt.Errorf("image_signatures.identities has issuer %q, subject %q; both are needed, and * is for subjects only", id.Issuer, id.Subject)
		}
		allowed, err := verify.NewShortCertificateIdentity(id.Issuer, "", "", glob(id.Subject).String())
		if err != nil {
			return nil, fmt.Errorf("image_signatures.identities: %w", err)
		}
		v.allow = append(v.allow, allowed)
	}
	names := make(map[string]bool)
	for _, k := range c.Keys {
		if k.Name == "" || k.Path == "" || names[k.Name] {
			return nil, fmt.Errorf("image_signatures.keys has name %q, path %q; both are needed, and each name once", k.Name, k.Path)
		}
		names[k.Name] = true
	}
	if _, err := v.load(); err != nil {
		return nil, fmt.Errorf("image_signatures: %w", err)
	}
	return v, nil
}

// glob returns what matches a pattern from its beginning to its end.
func glob(pattern string) *regexp.Regexp {
	return regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*") + "$")
}

// Values returns what the signatures that count say of an image, which
// registries call by these names, each name@digest: as selectors say it, without
// their type. There is nothing of an image that the configuration does not name,
// or that nobody has signed. It waits some seconds for a registry; what takes
// longer is there when it is asked again. The error says what went wrong, or why
// no signature counts; what is returned with it is true all the same.
func (v *Verifier) Values(ctx context.Context, images []string) ([]string, error) {
	var values []string
	var errs []error
	asked := 0
	for _, image := range images {
		repository, _, ok := strings.Cut(image, "@")
		if !ok || !slices.ContainsFunc(v.images, func(p *regexp.Regexp) bool { return p.MatchString(repository) }) {
			continue
		}
		if asked++; asked > maxImages {
			break
		}
		r := v.of(ctx, image)
		values = append(values, r.values...)
		if r.err != nil {
			errs = append(errs, fmt.Errorf("verify the signatures of %s: %w", image, r.err))
		}
	}
	slices.Sort(values)
	return slices.Compact(values), errors.Join(errs...)
}

// of returns what is known of one image.
func (v *Verifier) of(ctx context.Context, image string) result {
	v.mu.Lock()
	r, ok := v.known[image]
	v.mu.Unlock()
	if ok && time.Now().Before(r.until) {
		return r
	}
	answer := v.flights.DoChan(image, func() (any, error) { return v.find(image), nil })
	wait := time.NewTimer(waitTime)
	defer wait.Stop()
	select {
	case r := <-answer:
		return r.Val.(result)
	case <-wait.C:
		return result{err: fmt.Errorf("its registry has not answered within %v; it goes on", waitTime)}
	case <-ctx.Done():
		return result{err: ctx.Err()}
	}
}

// find asks the registry, and remembers what it found out.
func (v *Verifier) find(image string) result {
	ctx, cancel := context.WithTimeout(context.Background(), verifyTime)
	defer cancel()
	values, answered, err := v.verify(ctx, image)
	r := result{values: values, err: err, until: time.Now().Add(knownFor)}
	switch {
	case !answered:
		r.until = time.Now().Add(retryAfter)
	case len(values) == 0:
		r.until = time.Now().Add(knownUnknown)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.known) >= maxKnown {
		clear(v.known)
	}
	v.known[image] = r
	return r
}

// verify returns what the signatures of an image say that count, and whether the
// registry has answered. The error says what went wrong, or, if none counts, why
// one of them does not.
func (v *Verifier) verify(ctx context.Context, image string) (values []string, answered bool, err error) {
	trust, err := v.load()
	if err != nil {
		return nil, false, err
	}
	digest, err := name.NewDigest(image, name.StrictValidation)
	if err != nil {
		return nil, false, err
	}
	from, err := v.registry(digest)
	if err != nil {
		return nil, false, err
	}
	all, refused, err := from.signatures(ctx)
	if err != nil {
		return nil, false, err
	}
	for _, s := range all {
		said, err := trust.verify(s)
		if err != nil {
			refused = fmt.Errorf("no signature counts: %w", err)
		}
		values = append(values, said...)
	}
	if len(values) > 0 {
		refused = nil
	}
	return values, true, refused
}

// trust is what signatures are verified with.
type trust struct {
	identities *verify.Verifier // nil: none count
	allow      []verify.PolicyOption
	keys       map[string]*verify.Verifier // by name
}

// load reads the configured files.
func (v *Verifier) load() (*trust, error) {
	t := &trust{keys: make(map[string]*verify.Verifier)}
	if len(v.allow) > 0 {
		data, err := readFile(v.c.TrustedRootPath)
		if err != nil {
			return nil, err
		}
		trusted, err := root.NewTrustedRootFromJSON(data)
		if err != nil {
			return nil, fmt.Errorf("%s is no trusted root of Sigstore: %w", v.c.TrustedRootPath, err)
		}
		options := []verify.VerifierOption{verify.WithTransparencyLog(1), verify.WithObserverTimestamps(1), verify.WithoutStatementPredicate()}
		if len(trusted.CTLogs()) > 0 {
			options = append(options, verify.WithSignedCertificateTimestamps(1))
		}
		if t.identities, err = verify.NewVerifier(trusted, options...); err != nil {
			return nil, err
		}
		for _, id := range v.allow {
			t.allow = append(t.allow, verify.WithCertificateIdentity(id))
		}
	}
	for _, k := range v.c.Keys {
		data, err := readFile(k.Path)
		if err != nil {
			return nil, err
		}
		public, err := cryptoutils.UnmarshalPEMToPublicKey(data)
		if err != nil {
			return nil, fmt.Errorf("%s holds no public key: %w", k.Path, err)
		}
		by, err := signature.LoadVerifier(public, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("%s holds a key that signs no images: %w", k.Path, err)
		}
		always := root.NewExpiringKey(by, time.Time{}, time.Time{})
		material := root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) { return always, nil })
		// A key says by itself who signed, and lasts: no log and no time is needed.
		if t.keys[k.Name], err = verify.NewVerifier(material, verify.WithNoObserverTimestamps(), verify.WithoutStatementPredicate()); err != nil {
			return nil, err
		}
	}
	return t, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b bytes.Buffer
	if n, err := b.ReadFrom(&limited{f, maxFile}); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	} else if n == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return b.Bytes(), nil
}
