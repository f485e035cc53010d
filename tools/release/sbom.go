package main

// The software bill of materials of a binary: the modules that Go linked into it, instead
// of those in go.mod. It has no date except the commit's and nothing random, so that it is
// as reproducible as the binary.

import (
	"bytes"
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"os"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// writeSBOM writes a binary's SBOM beside it, as CycloneDX JSON.
func writeSBOM(binary, version string) error {
	bom, err := sbom(binary, version)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := cdx.NewBOMEncoder(&text, cdx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cdx.SpecVersion1_6); err != nil {
		return err
	}
	return os.WriteFile(strings.TrimSuffix(binary, ".exe")+".cdx.json", text.Bytes(), 0o644)
}

func sbom(binary, version string) (*cdx.BOM, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	sum, err := sumOf(binary)
	if err != nil {
		return nil, err
	}
	settings := map[string]string{}
	var properties []cdx.Property
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
		properties = append(properties, cdx.Property{Name: "go:build:" + s.Key, Value: s.Value})
	}

	self := component(cdx.ComponentTypeApplication, info.Main.Path, version)
	self.Hashes = &[]cdx.Hash{{Algorithm: cdx.HashAlgoSHA256, Value: fmt.Sprintf("%x", sum)}}
	self.Properties = &properties
	parts := []cdx.Component{component(cdx.ComponentTypeLibrary, "std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, module := range info.Deps {
		if module.Replace != nil {
			module = module.Replace
		}
		part := component(cdx.ComponentTypeLibrary, module.Path, module.Version)
		part.Properties = &[]cdx.Property{{Name: "go:sum", Value: module.Sum}}
		parts = append(parts, part)
	}

	bom := cdx.NewBOM()
	bom.SerialNumber = serial(sum)
	bom.Metadata = &cdx.Metadata{Timestamp: settings["vcs.time"], Component: &self}
	bom.Components = &parts
	return bom, nil
}

func component(kind cdx.ComponentType, name, version string) cdx.Component {
	purl := "pkg:golang/" + name + "@" + strings.ReplaceAll(version, "+", "%2B")
	return cdx.Component{Type: kind, Name: name, Version: version, PackageURL: purl, BOMRef: purl}
}

// serial is a UUID derived from a binary's checksum: version 8 of RFC 9562, which is for
// custom use.
func serial(sum []byte) string {
	id := sha256.Sum256(append([]byte("sbom:"), sum...))
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return fmt.Sprintf("urn:uuid:%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:16])
}
