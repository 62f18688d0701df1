package imagesig

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/hallmark-id/hallmark/pkg/version"
)

const (
	maxSignatures = 32      // of an image, of each of the two kinds
	maxBody       = 1 << 20 // bytes of an answer of a registry
	bundleType    = "application/vnd.dev.sigstore.bundle"
)

// registry is where the signatures of an image are.
type registry struct {
	image   name.Digest
	options []remote.Option
}

func (v *Verifier) registry(image name.Digest) (*registry, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DisableKeepAlives = true // there are a few questions, in ten minutes
	if v.c.RegistryCAPath != "" {
		data, err := readFile(v.c.RegistryCAPath)
		if err != nil {
			return nil, err
		}
		t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
		if !t.TLSClientConfig.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("%s holds no certificate", v.c.RegistryCAPath)
		}
	}
	auth, err := v.auth(image.RegistryStr())
	if err != nil {
		return nil, err
	}
	return &registry{image: image, options: []remote.Option{
		remote.WithTransport(bounded{t}), remote.WithAuth(auth), remote.WithUserAgent("hallmark/" + version.String()), remote.WithJobs(1),
	}}, nil
}

// auth is what a registry asks for, by the file with passwords.
func (v *Verifier) auth(registry string) (authn.Authenticator, error) {
	if v.c.RegistryAuthPath == "" {
		return authn.Anonymous, nil
	}
	data, err := readFile(v.c.RegistryAuthPath)
	if err != nil {
		return nil, err
	}
	var file struct {
		Auths map[string]struct{ Username, Password, Auth string }
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, fmt.Errorf("%s is not in the form of docker's config.json", v.c.RegistryAuthPath)
	}
	a, ok := file.Auths[registry]
	if !ok {
		return authn.Anonymous, nil
	}
	if a.Auth != "" {
		both, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(both), ":")
		if err != nil || !ok {
			return nil, fmt.Errorf("%s has an auth for %s that is not base64 of name:password", v.c.RegistryAuthPath, registry)
		}
		a.Username, a.Password = user, password
	}
	return &authn.Basic{Username: a.Username, Password: a.Password}, nil
}

// signatures returns those that the registry has of the image, in both of
// cosign's ways, and why what else is there is none.
func (r *registry) signatures(ctx context.Context) (all []*found, refused, err error) {
	options := append(r.options, remote.WithContext(ctx))
	read := func(f *found, err error) {
		if err != nil {
			refused = fmt.Errorf("no signature counts: %w", err)
		} else {
			all = append(all, f)
		}
	}
	if err := r.tagged(options, read); err != nil {
		return nil, nil, err
	}
	if err := r.referring(options, read); err != nil {
		return nil, nil, err
	}
	return all, refused, nil
}

// tagged reads signatures that are layers of what a tag made of the image's
// digest names.
func (r *registry) tagged(options []remote.Option, read func(*found, error)) error {
	tag := r.image.Context().Tag(strings.Replace(r.image.DigestStr(), ":", "-", 1) + ".sig")
	image, err := remote.Image(tag, options...)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	m, err := image.Manifest()
	if err != nil {
		return err
	}
	for _, layer := range m.Layers[:min(len(m.Layers), maxSignatures)] {
		content, err := blob(image, layer)
		if err != nil {
			return err
		}
		read(readLayer(content, layer.Annotations, r.image.DigestStr()))
	}
	return nil
}

// referring reads bundles that name the image as their subject (OCI Distribution
// 1.1, referrers).
func (r *registry) referring(options []remote.Option, read func(*found, error)) error {
	index, err := remote.Referrers(r.image, options...)
	if absent(err) {
		return nil
	}
	if err != nil {
		return err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return err
	}
	looked := 0
	for _, d := range m.Manifests {
		if !strings.HasPrefix(d.ArtifactType, bundleType) {
			continue
		}
		if looked++; looked > maxSignatures {
			break
		}
		image, err := remote.Image(r.image.Context().Digest(d.Digest.String()), options...)
		if absent(err) {
			continue
		}
		if err != nil {
			return err
		}
		m, err := image.Manifest()
		if err != nil {
			return err
		}
		if len(m.Layers) != 1 {
			continue
		}
		content, err := blob(image, m.Layers[0])
		if err != nil {
			return err
		}
		read(readBundle(content, r.image.DigestStr()))
	}
	return nil
}

// blob reads a layer, which must be what its digest says.
func blob(image v1.Image, d v1.Descriptor) ([]byte, error) {
	layer, err := image.LayerByDigest(d.Digest)
	if err != nil {
		return nil, err
	}
	body, err := layer.Compressed()
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(&limited{body, maxBody})
}

// absent reports whether a registry has no such thing.
func absent(err error) bool {
	var e *transport.Error
	return errors.As(err, &e) && e.StatusCode == http.StatusNotFound
}

// bounded bounds what a registry answers, and sends no password that others
// could read: a registry at a private address is asked without TLS.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.URL.Scheme != "https" && r.Header.Get("Authorization") != "" && !loopback(r.URL.Hostname()) {
		return nil, fmt.Errorf("%s is asked without TLS, so its password is not sent", r.URL.Host)
	}
	resp, err := b.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	body := resp.Body
	resp.Body = struct {
		io.Reader
		io.Closer
	}{&limited{body, maxBody}, body}
	return resp, nil
}

func loopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// limited fails after so many bytes.
type limited struct {
	r    io.Reader
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, errors.New("it is too long")
	}
	return n, err
}

func sha256Of(b []byte) []byte {
	sum := sha256.Sum256(b)
	return sum[:]
}
